"""What a quantized model computes with: packed and latent layers, the sign and its gradient, and the calls of the kernels."""

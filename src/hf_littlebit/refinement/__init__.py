"""Post-training refinement: block after block is factored and tuned on text, and the whole model distilled at the end."""

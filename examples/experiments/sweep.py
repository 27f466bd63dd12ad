"""Does every model class of the installed transformers survive quantizing? `python examples/experiments/sweep.py [CLASS ...]`

For each class a tiny random model is made, saved, quantized while it is loaded, run, saved and loaded again, and dequantized.
Right is: outputs are finite where the dense model's are, equal after loading, and near those of the dequantized model; the same
tensors after loading. One line of JSON for each class, and a count of the verdicts:

    ok           all of it; "kept" counts the modules that were left dense, by reason
    no forward   the tiny dense model itself does not run on the inputs that are tried here; the rest is right
    refused      nothing to quantize; "why" has the words
    no model     no tiny model of this class can be made by setting the sizes below
    wrong        anything else, with what failed

Without names: all classes for language modelling, with `--all` every base model too (an hour on two cores).
"""

from __future__ import annotations

import argparse
import collections
import inspect
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto as auto

from hf_littlebit import LittleBitConfig
from hf_littlebit.plan import plan_model

WIDTH, HEADS, LAYERS, INNER, EXPERTS = 64, 4, 2, 96, 4
# What configs call their sizes -> a small one. Those that are lists, off (None) or flags by default stay as they are.
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "hidden_dim", "attention_hidden_size"), WIDTH),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "projection_dim", "out_hidden_size", "lru_width"), WIDTH),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), INNER),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_decoder_layers", "speech_encoder_layers", "depth"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("decoder_attention_heads", "speech_encoder_attention_heads", "linear_num_value_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads", "index_n_heads"), HEADS // 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "qk_nope_head_dim", "v_head_dim", "mamba_d_state"), WIDTH // HEADS),
    **dict.fromkeys(("state_size", "mamba_d_head", "mamba_head_dim", "linear_key_head_dim"), WIDTH // HEADS),
    **dict.fromkeys(("linear_value_head_dim", "index_head_dim", "num_mel_bins"), WIDTH // HEADS),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "qk_rope_head_dim", "time_step_rank", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "image_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "zero_expert_num"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), INNER // 2),
    **dict.fromkeys(("n_group", "topk_group", "mamba_n_groups", "n_groups", "n_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "vocab_size", "vocab_size_per_layer_input"), 128),
    "patch_size": 8, "speech_encoder_intermediate_size": INNER, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "first_k_dense_replace": 1, "sliding_window": 16, "decoder_sparse_step": 1,
    "encoder_sparse_step": 2, "qk_head_dim": WIDTH // HEADS + 8, "mamba_expand": 2, "num_nextn_predict_layers": 0,
}  # fmt: skip
LARGEST = 40_000_000  # weights of a model that is still made
TOKENS = torch.arange(3, 35).reshape(2, 16)


def small(config_class: Any) -> dict[str, Any]:
    """The options that make a config of this class, and those in it, small."""
    default = config_class()
    mapped = getattr(config_class, "attribute_map", {})
    options: dict[str, Any] = {}
    for name, size in SIZES.items():
        own = vars(default).get(name)
        sized = isinstance(own, int) and not isinstance(own, bool)
        if name not in mapped and (sized or (name == "head_dim" and name in vars(default) and own is None)):
            options[name] = size
    for name in getattr(config_class, "sub_configs", {}):
        part = getattr(default, name, None)
        if part is not None:
            options[name] = {**small(type(part)), "model_type": part.model_type}
    return options


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """Arguments of a forward: tokens if the model reads any, else a picture or sound."""
    known = inspect.signature(model.forward).parameters
    random = torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    if "input_ids" in known:
        found["input_ids"] = TOKENS
    elif model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", 32)
        found["pixel_values"] = torch.randn(2, getattr(model.config, "num_channels", 3), size, size, generator=random)
    elif model.main_input_name == "input_values":
        found["input_values"] = torch.randn(2, 4000, generator=random)
    elif model.main_input_name == "input_features":
        found["input_features"] = torch.randn(2, getattr(model.config, "num_mel_bins", 16), 128, generator=random)
    if "decoder_input_ids" in known:
        found["decoder_input_ids"] = TOKENS
    return found


def output(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first tensor that the model returns; noise that it draws is the same every time."""
    torch.manual_seed(0)
    with torch.no_grad():
        result = model.eval()(**given)
    return next(value for value in result.values() if isinstance(value, torch.Tensor)).float()


def same(first: Any, second: Any) -> bool:
    """Whether two models hold the same tensors."""
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name].nan_to_num(), b[name].nan_to_num()) for name in a)


def check(name: str, bpw: float) -> dict[str, Any]:
    """The line of one class."""
    row: dict[str, Any] = {"class": name}
    model_class = getattr(transformers, name)
    try:
        torch.manual_seed(0)
        config = model_class.config_class(**small(model_class.config_class))
        with torch.device("meta"):
            if sum(value.numel() for value in model_class(config).parameters()) > LARGEST:
                return {**row, "verdict": "no model", "why": "too large"}
        dense = model_class(model_class.config_class(**small(model_class.config_class)))
    except Exception as error:
        return {**row, "verdict": "no model", "why": f"{type(error).__name__}: {error}"[:200]}
    options = LittleBitConfig(bpw, init="dual_svid")
    try:
        row["kept"] = {why: len(held) for why, held in plan_model(dense, options).dense.items()}
    except ValueError as error:
        return {**row, "verdict": "refused", "why": str(error)[:300]}
    try:
        given = inputs(dense)
        finite = bool(output(dense, given).isfinite().all())
    except Exception as error:
        given, finite, row["why"] = {}, False, f"{type(error).__name__}: {error}"[:200]
    with tempfile.TemporaryDirectory() as folder:
        dense.save_pretrained(f"{folder}/dense")
        try:
            model = model_class.from_pretrained(f"{folder}/dense", quantization_config=options)
            model.save_pretrained(f"{folder}/packed")
            again = model_class.from_pretrained(f"{folder}/packed")
            row["packed"] = len(model.hf_quantizer.plan.weights)
            right = same(model, again)
            if given:
                y = output(model, given)
                right = right and (bool(y.isfinite().all()) or not finite)
                right = right and torch.equal(output(again, given).nan_to_num(), y.nan_to_num())
                y, z = y.nan_to_num(), output(model.dequantize(), given).nan_to_num()
                row["error"] = float((y - z).norm() / z.norm().clamp_min(1e-9))
                right = right and row["error"] < 1e-3
        except Exception as error:
            return {**row, "verdict": "wrong", "why": f"{type(error).__name__}: {error}"[:300]}
    return {**row, "verdict": ("ok" if given else "no forward") if right else "wrong"}


def classes(every: bool) -> list[str]:
    """Names of the classes for language modelling; with `every` of all base models too."""
    kinds = ["CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ"]
    tables = [getattr(auto, f"MODEL_FOR_{kind}_MAPPING_NAMES") for kind in kinds]
    tables += [auto.MODEL_MAPPING_NAMES] if every else []
    named = [names if isinstance(names, tuple | list) else [names] for table in tables for names in table.values()]
    return [*dict.fromkeys(name for names in named for name in names if hasattr(transformers, name))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*", metavar="CLASS", help="names of model classes (default: see above)")
    parser.add_argument("--all", action="store_true", help="base models too")
    parser.add_argument("--bpw", type=float, default=4.0, help="bits per weight (default: 4)")
    parser.add_argument("--out", type=Path, help="also write the lines here")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("hf_littlebit").setLevel(logging.ERROR)
    lines, verdicts = [], collections.Counter()
    for name in options.classes or classes(options.all):
        row = check(name, options.bpw)
        verdicts[row["verdict"]] += 1
        lines.append(json.dumps(row))
        print(lines[-1], flush=True)
        if options.out:
            options.out.write_text("\n".join(lines) + "\n")
    print(", ".join(f"{verdict}: {count}" for verdict, count in verdicts.most_common()))


if __name__ == "__main__":
    main()

"""The options of the command line: all of LittleBitConfig's are there, and each is explained."""

import argparse

from hf_littlebit import LittleBitConfig
from hf_littlebit.command.arguments import build_parser, quantization_config

# Options of LittleBitConfig that are no business of `quantize`: for loading, or written by the code.
NO_FLAG = {"converted_from", "dequantize", "format_version", "quant_method", "ranks", "share_inputs"}
EVERY_FLAG = """--bpw 2 --init dual_svid --residual off --kv-factor 2 --skip o_proj --module down_proj:bpw=3 --format latent
    --seed 7 --steps 3 --refit-rounds 2 --towers --scale-dtype float16 --embedding-bits 8 --head-bits 4
    --base-model org/name --device cpu --workers 2"""


def test_every_option_of_the_config_is_reached():
    arguments = ["quantize", "model", "--out", "out", *EVERY_FLAG.split()]
    config, default = quantization_config(build_parser().parse_args(arguments)), LittleBitConfig(0.5)
    same = {option for option, value in vars(default).items() if getattr(config, option) == value}
    assert same == NO_FLAG


def test_help_explains_every_option():
    parser = build_parser()
    commands = next(action for action in parser._actions if action.dest == "command").choices
    assert set(commands) == {
        "quantize",
        "train",
        "pack",
        "convert",
        "info",
        "eval",
        "generate",
        "bench",
        "tune",
        "push",
    }
    for name, command in commands.items():
        assert f"littlebit {name}" in parser.format_help() and "example:" in command.format_help()
        for action in command._actions:
            if action.dest != "debug":
                assert action.help and action.help.strip() and action.help != argparse.SUPPRESS, (name, action.dest)
                # The sentence itself stands in the text, next to its option.
                words = "".join(command.format_help().split())
                assert "".join((action.help % vars(action)).split()) in words, (name, action.dest)
                assert all(flag in words for flag in action.option_strings)

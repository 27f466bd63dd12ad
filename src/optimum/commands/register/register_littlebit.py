"""`optimum-cli littlebit ...`: the command line of hf-littlebit as a command of optimum.

optimum imports every file of this folder at every start, so hf_littlebit, and torch with it, is imported only when the
command runs or its help is shown: the arguments are taken whole and handed on.
"""

from __future__ import annotations

import argparse
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

__all__ = ["REGISTER_COMMANDS"]

PROG = "optimum-cli littlebit"


class LittleBitCommand(BaseOptimumCLICommand):
    """`optimum-cli littlebit ...`, which hands its arguments to the command `littlebit`."""

    COMMAND = CommandInfo(name="littlebit", help="Quantize language models to 0.1 to 1 bit per weight, and use them.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        def show_help(*unused: Any) -> str:
            from hf_littlebit.command.cli import build_parser

            return build_parser(PROG).format_help()

        parser.format_help = show_help  # type: ignore[method-assign]
        parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def run(self) -> None:
        from hf_littlebit.command.cli import main

        raise SystemExit(main(self.args.arguments, PROG))


REGISTER_COMMANDS = [LittleBitCommand]

"""``python -m tools``: lists the commands; ``python -m tools <command> --help`` explains one."""

import fire

from tools.benchmark import benchmark
from tools.export import export
from tools.quickstart import quickstart

if __name__ == "__main__":
    fire.Fire({"quickstart": quickstart, "export": export, "benchmark": benchmark}, name="python -m tools")

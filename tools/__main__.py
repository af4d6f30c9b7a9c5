"""``python -m tools``: lists the commands; ``python -m tools <command> --help`` explains one."""

import fire

from tools.benchmark import benchmark
from tools.configs import configs
from tools.convert import convert
from tools.demos import demos
from tools.download import download
from tools.export import export
from tools.quickstart import quickstart
from tools.study import study

if __name__ == "__main__":
    commands = {
        "quickstart": quickstart,
        "demos": demos,
        "download": download,
        "export": export,
        "convert": convert,
        "benchmark": benchmark,
        "study": study,
        "configs": configs,
    }
    fire.Fire(commands, name="python -m tools")

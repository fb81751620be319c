"""`simpletuner train`: check the configuration without torch, then hand over."""

import os
from pathlib import Path

from simpletuner.base.console import say, work_goes_on
from simpletuner.base.signals import deferred_signals
from simpletuner.cli.help import help_asked, train_help
from simpletuner.cli.loading import load_here
from simpletuner.runs.process import stop_if_asked
from simpletuner.runs.samplers import end_samplers

_USAGE = "usage: simpletuner train [--config PATH | --env NAME | --example NAME] [--option value ...]"


def run(arguments: list[str]) -> int:
    """Check the configuration, then train. Returns the exit code.

    Raises:
        UserError: a problem the user can mend.
    """
    word = help_asked(arguments)
    if word is not None:
        say(train_help(_USAGE, word))
        return 0
    with deferred_signals, work_goes_on():
        loaded = load_here(arguments)
        end_samplers(Path.cwd(), os.environ, say)
        # torch: only once the configuration is known to be good
        from simpletuner.memory.rendezvous import join
        from simpletuner.train import job

        stop_if_asked()
        world = join(os.environ, float(loaded.config.distributed_timeout_s))
        return job.run(job.build(loaded, world))

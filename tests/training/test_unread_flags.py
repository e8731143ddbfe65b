"""The table of flags without effect is what a look through the wheel finds."""

import argparse
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from megatron.training.arguments import add_megatron_arguments

from more_megatron.training.flag_checks import OTHER_PROGRAMS, UNREAD, unread_flags

# Files that no pretraining of ours runs, or that name every flag: dataclasses, and the YAML form of the flags.
_ELSEWHERE = re.compile(
    r"^(training/(yaml_arguments\.py|config/|distillation)|core/inference|rl/|legacy|post_training|core/num_microbatches"
    r"|core/(models/(bert|T5|multimodal|vision|mimo|mamba|hybrid|retro)|ssm|export|post_training)"
    r"|core/datasets/(t5|bert|masked|multimodal|retro))"
)
# Read under a name that is put together at run time, or true of every run.
_READ_OTHERWISE = re.compile(r"^(muon_|inprocess_|moe_(deepep|hybridep)_num_sms|deprecated_use_mcore_models)")
_READ = re.compile(r"""\.([A-Za-z_]\w*)|getattr\(\s*\w+,\s*['"](\w+)['"]""")


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    """Return Megatron's parser."""
    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def _names_that_are_read() -> set[str]:
    spec = find_spec("megatron.core")
    assert spec is not None
    assert spec.origin is not None
    wheel = Path(spec.origin).parents[1]
    files = [path for path in wheel.rglob("*.py") if not _ELSEWHERE.match(str(path.relative_to(wheel)))]
    files += Path(__file__).parents[2].joinpath("more_megatron").rglob("*.py")
    return {name for path in files for found in _READ.findall(path.read_text()) for name in found if name}


def test_every_flag_that_nothing_reads_is_in_the_table(parser: argparse.ArgumentParser) -> None:
    read = _names_that_are_read()
    missing = []
    for group in parser._action_groups:
        for action in group._group_actions:
            name = action.dest
            known = name in UNREAD or _READ_OTHERWISE.search(name)
            known = known or any(OTHER_PROGRAMS.search(part) for part in (group.title or "", name))
            if name != "help" and name not in read and not known:
                missing.append(name)
    assert missing == []
    assert not read & UNREAD.keys()


def test_given_in_vain(parser: argparse.ArgumentParser) -> None:
    assert list(unread_flags(parser, {"lr", "num_layers", "cuda_graph_scope_deprecated"})) == []
    [ramp, vision] = unread_flags(parser, {"rampup_batch_size", "num_classes"})
    assert "--step-batch-size-schedule" in ramp
    assert vision == "--num-classes has no effect in pretraining: leave it out"

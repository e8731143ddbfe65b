"""The model under evaluation: a Hugging Face folder, or a checkpoint that is exported into a temporary one."""

import argparse
import contextlib
import hashlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from more_megatron.data.sources import sha256_of
from more_megatron.errors import MoREError, last_line
from more_megatron.flags import check_ranges, flag

# Not the card, which has a date, and not the code.
_CONTENT = (".safetensors", ".bin", ".json", ".model")
_DTYPES = ("float32", "bfloat16", "float16")
_FLAGS = {"num_steps": "--num-steps", "criterion": "--exit-criterion", "exit_threshold": "--exit-threshold"}


@dataclass(frozen=True)
class ExportedModel:
    """A model in transformers, ready to be called."""

    source: Path  # what the user named
    folder: Path  # where the model lies; temporary if the user named a checkpoint
    model: Any  # the model, in evaluation
    tokenizer: Any  # its tokenizer, which takes names of special tokens in a text as text, as training did

    @property
    def recurrent(self) -> bool:
        """Whether the number of steps means anything to it."""
        return bool(getattr(getattr(self.model, "system", None), "recurrent", False))

    @property
    def length(self) -> int:
        """Tokens of the longest text that it reads at once."""
        return int(self.model.config.max_position_embeddings)

    @property
    def num_steps(self) -> int | None:
        """Recurrence steps that it takes unless told otherwise; None without recurrence."""
        return int(self.model.config.mean_recurrence) if self.recurrent else None

    @property
    def digest(self) -> str:
        """SHA-256 of weights, configuration and tokenizer."""
        files = sorted(path for path in self.folder.iterdir() if path.suffix in _CONTENT)
        return hashlib.sha256(b"".join(bytes.fromhex(sha256_of(path)) for path in files)).hexdigest()

    def call_options(self, num_steps: int | None, **exits: Any) -> dict[str, Any]:
        """Return the arguments of every call that say how deep it goes, and how tokens stop by themselves before that.

        None: the model's own number of steps; none that stops.

        Raises:
            MoREError: If the model has no steps, cannot take so many, or cannot stop so.
        """
        import torch

        options = {name: value for name, value in {"num_steps": num_steps, **exits}.items() if value is not None}
        if not options:
            return {}
        if not self.recurrent:
            first = _FLAGS[next(iter(options))]
            raise MoREError(f"{first} has no effect on {self.source}: it has no recurrence; leave the flag out")
        try:
            with torch.no_grad():
                self.model(torch.zeros(1, 1, dtype=torch.long, device=self.model.device), **options)
        except ValueError as error:
            asked = " ".join(f"{_FLAGS[name]} {value}" for name, value in options.items())
            raise MoREError(f"{asked} cannot be taken by {self.source}: {error}") from error
        return options


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the flags that name a model, and where and how it runs."""
    group = parser.add_argument_group("model")
    source = group.add_mutually_exclusive_group(required=required)
    source.add_argument("--model", type=Path, metavar="DIR", help="folder of a Hugging Face model")
    source.add_argument("--load", type=Path, metavar="CKPT", help="folder that a run saved to, under any layout")
    group.add_argument("--ckpt-step", type=int, metavar="N", help="iteration of the checkpoint (default: the newest)")
    group.add_argument("--tokenizer-model", metavar="M", help="where the tokenizer of the run is, if it has moved")
    group.add_argument("--trust-remote-code", action="store_true", help="let the folder run code of its own")
    group.add_argument("--dtype", choices=_DTYPES, help="dtype of the computation (default: that of the weights)")
    group.add_argument("--device", default=None, metavar="D", help="cpu, cuda or cuda:N (default: cuda where it is)")
    group.add_argument("--batch-size", type=int, default=8, metavar="B", help="texts at a time (default: 8)")


@contextlib.contextmanager
def open_model(args: argparse.Namespace) -> Iterator[ExportedModel]:
    """Yield the model that the flags of `add_model_arguments` name.

    Raises:
        MoREError: If the folder or checkpoint is missing, damaged or without a tokenizer.
    """
    check_ranges(args, {"batch_size": "[1, inf)", "num_steps": "(-inf, 10000]"})
    if args.model is not None:
        for name in ("ckpt_step", "tokenizer_model"):
            if getattr(args, name, None) is not None:
                raise MoREError(f"{flag(name)} is of checkpoints: give --load, or leave it out")
        yield _load(args, args.model)
        return
    from more_megatron.hf.conversion.export import to_hf

    with tempfile.TemporaryDirectory(prefix="more-export-") as temporary:
        folder, trust = Path(temporary) / "model", args.trust_remote_code
        to_hf(args.load, folder, step=args.ckpt_step, tokenizer_model=args.tokenizer_model, trust_remote_code=trust)
        yield _load(args, folder)


def _load(args: argparse.Namespace, folder: Path) -> ExportedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    from more_megatron.hf.conversion.json_files import check_links
    from more_megatron.hf.exported.configuration_more import MoREConfig
    from more_megatron.hf.exported.modeling_more import MoREForCausalLM

    # An export is computed by this package's code, so that it need not be trusted.
    AutoConfig.register(MoREConfig.model_type, MoREConfig, exist_ok=True)
    AutoModelForCausalLM.register(MoREConfig, MoREForCausalLM, exist_ok=True)
    source = args.load or folder
    if not (folder / "config.json").is_file():
        raise MoREError(f"--model {folder} is not a folder of a Hugging Face model: it has no config.json")
    check_links(folder)
    device = _device(args.device)
    load: Any = AutoModelForCausalLM.from_pretrained
    options = {"dtype": args.dtype or "auto", "trust_remote_code": args.trust_remote_code}
    try:
        model, report = load(folder, output_loading_info=True, **options)
    except Exception as error:  # Whatever a damaged file makes of itself in transformers, safetensors or json.
        raise MoREError(f"the model {source} cannot be loaded: {last_line(error)}") from error
    if missing := sorted(report["missing_keys"]):  # transformers draws them at random, and goes on.
        raise MoREError(f"the model {source} lacks {len(missing)} of its weights, {missing[0]} first: export it again")
    return ExportedModel(source, folder, model.eval().to(device), _tokenizer(args, folder))


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise MoREError(f"--device {name} cannot be used: {last_line(error)}") from error


def _tokenizer(args: argparse.Namespace, folder: Path) -> Any:
    from more_megatron.hf.conversion.tokenizer_files import open_tokenizer

    try:
        # Names of special tokens in a text were text to SentencePiece in training.
        literal = (folder / "tokenizer.model").is_file()
        tokenizer = open_tokenizer(folder, literal=literal, trust_remote_code=args.trust_remote_code)
    except Exception as error:
        raise MoREError(f"the model {args.load or folder} has no usable tokenizer: {last_line(error)}") from error
    # Texts are cut into windows here; no need to warn of long ones.
    tokenizer.model_max_length = sys.maxsize
    return tokenizer

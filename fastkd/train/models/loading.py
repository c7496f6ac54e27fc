"""Models and tokenizers from a folder or the hub: all of their weights, all of them finite, or one line that says why.

transformers starts weights that a checkpoint lacks at random, and makes up a tokenizer that is not there. Here both are
errors, as is whatever else would leave a model that is not the one that was saved.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.utils import cached_file

from ...heads import gathered
from ..common.errors import InputError, one_line
from ..common.family import KINDS, family_of, kind_of
from ..common.hub import from_hub
from ..common.processes import by_first
from .anatomy import auto_class
from .sharding import is_sharded, not_finite, shard
from .student import is_tied
from .tokenizer import special_tokens

SHOWN = 4  # names of weights in a message


def load_config(name: str | Path, role: str) -> Any:
    """Return the config of a `save_pretrained` folder, or of a model on the hub; see `load_model`.

    A decoder beside an encoder whose start token it does not name starts from padding, as T5's.
    """
    with _loading(name, role) as options:
        config = AutoConfig.from_pretrained(name, **options)
    try:
        row = family_of(config)
    except ValueError as error:
        raise InputError(f"{role} {name}: {error}") from error
    if getattr(config, "quantization_config", None):
        raise InputError(f"{role} {name} is quantised: expected plain weights, as before its quantisation")
    _check_numbers(config, role, name)
    starts = row.has_both
    if starts and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id
        if config.decoder_start_token_id is None:
            neither = "its config.json has neither decoder_start_token_id nor pad_token_id"
            raise InputError(f"{role} {name}: {neither}: add what its decoder was trained to start from (0 for T5)")
    for kind in ("pad_token_id", "decoder_start_token_id")[: len(row.stacks)]:
        its = getattr(config, kind)
        if (starts or its is not None) and not (isinstance(its, int) and 0 <= its < config.vocab_size):
            expected = f"expected that of one of its {config.vocab_size} pieces"
            raise InputError(f"{role} {name}: its config's {kind} is {its!r}: {expected}")
    return config


def _check_numbers(config: Any, role: str, name: str | Path) -> None:
    """Raise InputError for a config of whose numbers no model can be made, or only one that fails at its first batch.

    It names the fields for which its family's default, in place of what the config says, mends that.
    """
    error = _fault(config)
    if error is None:
        return
    defaults, faults, family = type(config)(), [], family_of(config).name
    for key in sorted(vars(defaults).keys() & config.to_diff_dict().keys()):
        if _fault(config, **{key: getattr(defaults, key)}) is None:
            faults.append(f"{key} is {getattr(config, key)!r} ({family}'s own: {getattr(defaults, key)!r})")
    said = f"config's {' or '.join(faults)}, which" if faults else "config"
    raise InputError(f"{role} {name}: its {said} makes no {family} that works: {one_line(error)}")


@torch.no_grad()
def _fault(config: Any, **others: Any) -> Exception | None:
    """Return what goes wrong in models with the config's numbers, but for `others`, or None.

    A small one computes, and the whole one is made without weights, as its sizes may not go together.
    """
    whole, row = copy.deepcopy(config), family_of(config)
    most = dict.fromkeys(row.shrinks, 4) | dict.fromkeys((*row.heads, *row.depths.values()), 1) | {"hidden_size": 8}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        torch.manual_seed(0)
        try:
            whole.update(others)
            small = copy.deepcopy(whole)
            most |= {"head_dim": 4, "vocab_size": 4 + (small.pad_token_id or 0)}  # padding has a place in embeddings
            known = {size: getattr(small, size, None) for size in most}
            small.update({x: min(its, most[x]) for x, its in known.items() if its is not None} | {"widths": None})
            model = auto_class(small).from_config(small, dtype=torch.float32).eval()
            # As many tokens as let every bucket of relative positions be used.
            ids = torch.arange(getattr(small, "relative_attention_num_buckets", 0) + 2)[None] % small.vocab_size
            sides = ("input_ids", "decoder_input_ids")[: len(row.stacks)]
            logits = model(**dict.fromkeys(sides, ids)).logits
            if not logits.isfinite().all():
                return ValueError("what it computes is not finite")
            with torch.device("meta"):
                auto_class(whole).from_config(whole)
            return None
        except Exception as error:  # whatever such a number leads to
            return error


def load_tokenizer(name: str | Path, role: str, config: Any) -> Any:
    """Return the tokenizer beside a model of that config, set to pad on the right; see `load_model`."""
    with _loading(name, role) as options:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    has_decoder = "decoder" in family_of(config).stacks
    if tokenizer.pad_token_id is None and kind_of(config) == "causal":
        # EOS's pads then, as labels are -100 there anyway. But not in the config: an embedding learns nothing of what
        # that calls padding, and EOS stands between texts.
        its = tokenizer.eos_token_id if config.pad_token_id is None else config.pad_token_id
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(its)
    pieces = tokenizer.get_vocab()
    if not any(piece.strip("▁").isalnum() for piece in pieces.keys() - special_tokens(tokenizer).keys()):
        raise InputError(f"{role} {name} has no tokenizer: expected tokenizer.json or spiece.model beside the weights")
    rows = max(pieces.values()) + 1
    if rows > config.vocab_size:
        raise InputError(f"{role} {name}: its tokenizer has {rows} pieces, its embedding only {config.vocab_size}")
    for kind in ("pad_token_id", "eos_token_id" if has_decoder else "sep_token_id"):
        its, expected = getattr(tokenizer, kind), getattr(config, kind, None)
        several = expected if isinstance(expected, list) else [expected]
        if its is None or (expected is not None and its not in several):
            both = f"its tokenizer's {kind} is {its}, its config's {expected}"
            raise InputError(f"{role} {name}: {both}: expected the tokenizer that the model was trained with")
    return tokenizer


def load_model(name: str | Path, role: str, dtype: torch.dtype | str = torch.float32) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a `save_pretrained` folder, or of a model on the hub.

    role: "teacher" or "student", for messages. No code of the repository is run. dtype: see `load_weights`.
    Raises InputError if there is no such folder or model, it holds none of a known family, or it lacks a part.
    """
    config = load_config(name, role)
    tokenizer = load_tokenizer(name, role, config)
    return load_weights(name, role, config, dtype), tokenizer


def load_weights(
    name: str | Path,
    role: str,
    config: Any,
    dtype: torch.dtype | str = torch.float32,
    shard_on: torch.device | None = None,
    seed: int = 0,
) -> Any:
    """Return the model of a folder or a name, whose config that is, with every weight as it was saved.

    But for a classifier whose config names no class, whose head may be missing, see `student.with_classes`: what is
    below it, but was not saved, is random by the seed.

    dtype: "auto" is that of the checkpoint if it is float32 or bfloat16, else float32: in float16 T5s overflow, and
    transformers clamps them without a word. shard_on: a device of each process over which the weights are to be
    spread; only the first process reads them.
    """

    def load() -> Any:
        with _loading(name, role) as options:
            settings = {"config": config, "dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
            level = transformers.logging.get_verbosity()
            transformers.logging.set_verbosity_error()  # what is wrong with the weights is said below, in one line
            with contextlib.ExitStack() as after, torch.random.fork_rng(devices=[]):
                after.callback(transformers.logging.set_verbosity, level)
                torch.manual_seed(seed)
                model, found = auto_class(config).from_pretrained(name, **settings, **options)
            saved, _ = PreTrainedConfig.get_config_dict(name, **options)
            folder = Path(str(cached_file(name, "config.json", local_files_only=True))).parent
            found["no_floats"] = _no_floats(folder, tuple(model.state_dict()))
        if saved.get("tie_word_embeddings") is False and is_tied(model):  # transformers ties a head that is not there
            found["missing_keys"] = {*found["missing_keys"], "lm_head.weight"}
        _check_whole(model, found | _without_other_heads(config, found), name, role)
        if dtype == "auto" and model.dtype not in (torch.float32, torch.bfloat16):
            print(f"{role} {name}: saved in {str(model.dtype).removeprefix('torch.')}, it runs in float32")
            model.float().config.dtype = torch.float32
        return model

    if shard_on is None:
        return load()
    # No other process than the first ever holds all of it.
    loaded: list[Any] = []

    def kind_in_first() -> tuple[torch.dtype, bool]:
        loaded.append(load())
        return loaded[0].dtype, is_tied(loaded[0])

    kind = by_first(kind_in_first)
    model = loaded[0] if loaded else _empty(config, *kind)
    weights = model.state_dict() if loaded else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(shard(model, shard_on), weights, options=options)
    return model


def files_fingerprint(name: str | Path) -> str | None:
    """Return a fingerprint of a model's files, whose config was loaded; None if its weights are not here yet."""
    folder = Path(str(cached_file(name, "config.json", local_files_only=True))).parent
    found, weights = hashlib.sha256(), _weight_files(folder)
    for path in (folder / "config.json", *weights):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()[:16] if weights else None


def _check_whole(model: Any, found: Mapping[str, Any], name: str | Path, role: str) -> None:
    """Raise InputError for weights that the checkpoint lacks, has too many, in another shape, or that are no numbers.

    found: what transformers says about them. Weights that are the same, as those of a head and its embedding, and the
    tables of relative positions that T5 once saved and never used, are none of these to it.
    """
    shapes = [f"{key} {tuple(its)} for {tuple(mine)}" for key, its, mine in found["mismatched_keys"]]
    kinds = {
        "lacks": found["missing_keys"],
        "has, unlike its config,": found["unexpected_keys"],
        "has": shapes,
        "has, as no floats,": found["no_floats"],
    }
    faults = []
    for verb, names in kinds.items():
        first = ", ".join(sorted(names)[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        faults += [f"{verb} {first}"] if names else []
    bad = not_finite(model)
    if found.get("error_msgs"):
        faults.append(" ".join(str(found["error_msgs"][0]).split()))
    if bad is not None and not faults:
        faults.append(f"has numbers in {bad} that are not finite")
    if faults:
        raise InputError(f"the checkpoint of {role} {name} {', and '.join(faults)}: expected the weights of its config")


def _without_other_heads(config: Any, found: Mapping[str, Any]) -> dict[str, set[str]]:
    """Return the keys that are missing and unexpected, but for those that are of a head: another's, or one to be made.

    A checkpoint of an encoder may hold the heads of its pre-training beside that which is asked for.
    """
    keys, row = {name: set(found[name]) for name in ("missing_keys", "unexpected_keys")}, family_of(config)
    if len(row.kinds) == 1 or not any(keys.values()):
        return keys
    names: dict[str, set[str]] = {}
    for auto in ("AutoModel", "AutoModelForPreTraining", *(KINDS[kind].auto for kind in row.kinds)):
        with torch.device("meta"), contextlib.suppress(ValueError):  # of a class of ours, which has not all of them
            made = getattr(transformers, auto).from_config(config)
            prefix = f"{made.base_model_prefix}." if made.base_model is made else ""
            names[auto] = {before + key for before in ("", prefix) for key in made.state_dict()}
    keys["unexpected_keys"] -= set().union(*names.values())
    if kind_of(config) == "classifier" and not any(config.id2label.values()):
        keys["missing_keys"] &= names[KINDS["masked"].auto]
    return keys


def _no_floats(folder: Path, names: tuple[str, ...]) -> list[str]:
    """Return the tensors of a checkpoint, each with its type, of which transformers makes floats without a word.

    names: of the model's weights; what is none of these, as masks and positions that once were saved, nobody reads.
    """
    found = []
    for path in _weight_files(folder):
        if path.suffix == ".bin":  # of which nothing but the head is read
            state = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
            types = {key: value.dtype for key, value in state.items() if not value.is_floating_point()}
        else:
            with safe_open(path, "pt") as file:
                every = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
            types = {key: value for key, value in every.items() if not value.startswith(("F", "BF"))}
        read = [key for key in types if key.endswith(names) or any(name.endswith(key) for name in names)]
        found += [f"{key} ({types[key]})" for key in read]
    return found


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder that transformers takes a model's weights from."""
    kinds = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")
    return next((files for kind in kinds if (files := sorted(folder.glob(kind)))), [])


def _empty(config: Any, dtype: torch.dtype, tied: bool) -> Any:
    """Return a model of a config whose weights are memory that was never written to, so that it takes none.

    tied: whether the head is the embedding, which the config need not tell.
    """
    with init_empty_weights():
        model = auto_class(config).from_config(config, dtype=dtype)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # as they are computed
    model.to_empty(device="cpu").tie_weights()
    for name, buffer in buffers.items():
        model.get_buffer(name).copy_(buffer)
    if not tied and is_tied(model):
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    return model.eval()


@torch.no_grad()
def unsharded(model: Any) -> Any:
    """Return a copy of a sharded model with whole weights on every process, in evaluation mode; others as they are."""
    if not is_sharded(model):
        return model
    plain = _empty(model.config, model.dtype, is_tied(model)).to(model.device)
    for name, parameter in model.named_parameters():
        if not name.startswith("hidden_projection."):  # of the training, no part of the model
            plain.get_parameter(name).copy_(gathered(parameter))
    for name, buffer in model.named_buffers():
        plain.get_buffer(name).copy_(buffer)
    return plain


# What goes wrong ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _loading(name: str | Path, role: str) -> Iterator[dict[str, Any]]:
    """Yield the options of `from_pretrained`, and turn what goes wrong into one line about a folder or the hub."""
    folder, options = Path(name), {"local_files_only": True, "trust_remote_code": False}
    if not folder.is_dir():
        with from_hub(str(name), role, "model", _reason) as offline:
            yield {**options, "local_files_only": offline}
        return
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{role} folder {folder} holds an adapter: expected a whole model, as of merge_and_unload()")
    if not (folder / "config.json").is_file():
        inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"; its folders {', '.join(inner)} have" if inner else ""
        raise InputError(
            f"{role} folder {folder} has no config.json: expected a save_pretrained folder of a model{hint}"
        )
    try:
        yield options
    except Exception as error:  # a file that somebody else made can make its reader raise anything
        raise InputError(f"cannot load the {role} in {name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return in one line what transformers could not do, and what to do about it where that does not tell."""
    if isinstance(error, pickle.UnpicklingError):
        return (
            "its .bin file holds more than weights, or is a pointer to them that git lfs pull replaces: expected "
            "safetensors, as save_pretrained writes them"
        )
    if any(package in str(error) for package in ("protobuf", "tiktoken")):  # the second is asked for the first's sake
        try:
            import google.protobuf  # noqa: F401
        except ImportError:
            return "its spiece.model is read by the package protobuf, which is not installed: pip install protobuf"
    if isinstance(error, SafetensorError):
        return f"{error}: its file of weights is cut off, or a pointer to it that git lfs pull replaces"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, KeyError | TypeError | AttributeError):  # of transformers, which expected another file
        return f"one of its JSON files is not as save_pretrained writes it ({type(error).__name__}: {error})"
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__

"""Opening what `save_pretrained` wrote, a folder or a name on the Hugging Face hub: the one place that calls
transformers for it.

Code that comes with a model runs only with `trust_remote_code`. transformers would ask at the terminal if it were not
told yes or no, so every call passes the setting.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from textwrap import shorten
from typing import Any

from actors.columns import Head
from actors.errors import ModelError
from actors.imports import without_model_code

# Transformers builds a model under a default device that holds for the whole process: of two roles that load in one
# process at once (`--local`), one would be left without data.
LOADING = threading.Lock()
CLASSES = {
    Head.VOCABULARY: "AutoModelForCausalLM",
    Head.TOKEN_SCALAR: "AutoModelForTokenClassification",
    Head.STEP_SCALAR: "AutoModelForTokenClassification",
    Head.ROW_SCALAR: "AutoModelForSequenceClassification",
}
SCORE = "score"  # the layer that is a scalar head, in transformers' classes
ADAPTER_CONFIG = "adapter_config.json"
MERGE = "merge it first: troupe merge ADAPTER --base MODEL --into FOLDER, and use that folder"


def check_folder(path: str, key: str = "model.path") -> None:
    """Raises ModelError unless a folder holds a model; a name that is no folder is taken for one of the hub's. `key`
    is where the path was set."""
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_absolute() or path.startswith((".", "~")):
            raise ModelError(f"{key}: there is no folder {path}")
        return
    files = sorted(entry.name for entry in folder.iterdir())
    weights = [name for name in files if _holds_weights(name)]
    if ADAPTER_CONFIG in files and not weights:
        raise ModelError(f"{key}: {path} holds a LoRA adapter and no model; {MERGE}")
    if ADAPTER_CONFIG in files:
        # transformers would attach it unasked, and save it in the place of the weights
        raise ModelError(
            f"{key}: {path} holds a LoRA adapter ({ADAPTER_CONFIG}) beside the weights of a model\n"
            "  if the model is meant: move the adapter's files to another folder\n"
            f"  if the adapter is meant: {MERGE}"
        )
    if "config.json" not in files or not weights:
        raise ModelError(
            f"{key}: {path} is not a model folder\n"
            f"  it holds: {', '.join(files[:8]) or 'nothing'}{', ...' if len(files) > 8 else ''}\n"
            "  needed:   config.json and weights (model.safetensors), as `save_pretrained` writes them"
        )


def load_config(path: str, trust_remote_code: bool) -> Any:
    """The model's configuration. Raises ModelError."""
    from transformers import AutoConfig

    # Code that comes with the model may well need that of others.
    with _refusing("a configuration", path), nullcontext() if trust_remote_code else without_model_code():
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def load_tokenizer(path: str, trust_remote_code: bool, chat_template: str | None = None) -> Any:
    """The tokenizer, with another chat template (its text) if one is given. Raises ModelError."""
    with _refusing("a tokenizer", path, "set model.tokenizer to a folder that holds one"):
        load: Any = (_tokenizer_class(Path(path)) or _auto_tokenizer()).from_pretrained
        tokenizer = load(path, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def _tokenizer_class(folder: Path) -> Any:
    """The class that AutoTokenizer would find, if the folder names that of its own type of model; else None. To import
    AutoTokenizer is to import torch and its compiler, which takes 4 of the 6 seconds of a process that only decodes.

    Of its own type: defined in the package of that type in transformers. If its packages are laid out otherwise one
    day, this finds nothing, AutoTokenizer is used, and a test says so."""
    import transformers

    try:
        named = json.loads((folder / "tokenizer_config.json").read_text())
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError):
        return None  # of the hub, or not a folder of a model: AutoTokenizer says what is wrong
    name = named.get("tokenizer_class")
    found = None if name is None or "auto_map" in named else getattr(transformers, name, None)
    return found if getattr(found, "__module__", "").startswith(f"transformers.models.{kind}.") else None


def _auto_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer


def load_pretrained(
    path: str, trust_remote_code: bool, *, head: Head = Head.VOCABULARY, may_draw: bool = False, **options: Any
) -> Any:
    """The model with that head, on the CPU. A scalar head that the folder does not have is drawn at random, near zero,
    if `may_draw`; any other weight that it lacks is refused. Of a process reward model with two labels, wrong and
    right, the difference of their logits is taken. `options` are those of `from_pretrained`. Raises ModelError."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars of reading and writing files would draw over the driver's console
    check_folder(path)
    two_labels = False
    if head is not Head.VOCABULARY:
        options["config"] = config = load_config(path, trust_remote_code)
        two_labels = head is Head.STEP_SCALAR and _has_two_labels(config)
        config.num_labels = 2 if two_labels else 1
        # Nothing but a new head is drawn. It begins near zero: with the deviation of the model's other layers, a state
        # of norm sqrt(H) would get values as far apart as rewards are, which a critic would first have to unlearn.
        for part in _drawn_parts(config):
            part.initializer_range = 1 / (config.get_text_config().hidden_size + 1)
    with _refusing(f"a model with a {head} head", path), LOADING, _without_report():
        auto = getattr(transformers, CLASSES[head])
        causal, found = auto.from_pretrained(
            path, trust_remote_code=trust_remote_code, output_loading_info=True, **options
        )
    if getattr(causal, "_hf_peft_config_loaded", False):  # of the hub: a folder was looked at before
        raise ModelError(f"{path} holds a LoRA adapter, which transformers loaded with its base model; {MERGE}")
    _refuse_drawn(path, head, may_draw, set(found["missing_keys"]), set(found["unexpected_keys"]))
    if head is not Head.VOCABULARY and not hasattr(causal, SCORE):
        raise ModelError(
            f"{path}: {type(causal).__name__} has no layer `{SCORE}`, which the classes of most decoders have; use a "
            "model of another architecture"
        )
    if head is not Head.VOCABULARY:
        own = _drawn_parts(load_config(path, trust_remote_code))
        for part, before in zip(_drawn_parts(causal.config), own, strict=True):
            part.initializer_range = before.initializer_range  # it is saved with the model
    if two_labels:
        _take_difference(causal)
    return causal


def skeleton(path: str, trust_remote_code: bool, head: Head = Head.VOCABULARY) -> Any:
    """The model with that head, without its weights: every module, on torch's `meta` device. Raises ModelError."""
    import torch
    import transformers

    config = load_config(path, trust_remote_code)
    if head is not Head.VOCABULARY:
        config.num_labels = 1
    with _refusing(f"a model with a {head} head", path), LOADING, torch.device("meta"):
        return getattr(transformers, CLASSES[head]).from_config(config, trust_remote_code=trust_remote_code)


def _drawn_parts(config: Any) -> list[Any]:
    """The parts of a configuration that say how weights are drawn: the whole, and that of the text model if there is
    one."""
    parts = {id(part): part for part in (config, config.get_text_config())}
    return [part for part in parts.values() if hasattr(part, "initializer_range")]


def _has_two_labels(config: Any) -> bool:
    names: list[str] = config.architectures or []
    return config.num_labels == 2 and any(name.endswith("ForTokenClassification") for name in names)


def _take_difference(classifier: Any) -> None:
    """Two labels become one number: the logit of label 1 (right) minus that of label 0 (wrong)."""
    from torch import nn

    two = classifier.score
    with_bias = two.bias is not None
    one = nn.Linear(two.in_features, 1, bias=with_bias, device=two.weight.device, dtype=two.weight.dtype)
    one.weight.data = two.weight.data[1:] - two.weight.data[:1]
    if with_bias:
        one.bias.data = two.bias.data[1:] - two.bias.data[:1]
    classifier.score, classifier.num_labels, classifier.config.num_labels = one, 1, 1


def padding_token(tokenizer: Any, config: Any) -> str:
    """The token that pads rows for a model with a scalar head: its Hugging Face class takes a row's score before the
    padding, so a token that ends rows cannot be it. The tokenizer's own, or another special token. Raises ModelError if
    there is none."""
    given = config.get_text_config().eos_token_id
    ends = {tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])}
    special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    others = [name for name, index in special.items() if index not in ends and "pad" in name.lower()]
    for name in (tokenizer.pad_token, *others, tokenizer.unk_token):
        index = None if name is None else tokenizer.convert_tokens_to_ids(name)
        if index is not None and index not in ends:
            return str(name)
    raise ModelError(
        f"the tokenizer pads with {tokenizer.pad_token!r} and has no special token to pad with instead: a model that "
        "gives rows a score needs one that does not end them. Add one (tokenizer.add_special_tokens({'pad_token': "
        "'<pad>'}), within the model's vocabulary), save the tokenizer, and set model.tokenizer to its folder"
    )


def _refuse_drawn(path: str, head: Head, may_draw: bool, missing: set[str], unread: set[str]) -> None:
    """Raises ModelError for weights that the folder lacks, which transformers draws at random, and for a part of a
    score that would be lost."""
    if head is not Head.VOCABULARY and f"{SCORE}.bias" in unread:
        raise ModelError(
            f"{path} holds a head with a bias, that of a {Head.TOKEN_SCALAR} model, and a model with a {head} head has "
            "none: its numbers would be others. Start from the model that it was made of"
        )
    new = {name for name in missing if head is not Head.VOCABULARY and name.startswith(f"{SCORE}.")}
    if new >= {f"{SCORE}.weight"} and not may_draw:
        raise ModelError(
            f"{path} holds no head that gives a number, and a new one, drawn at random, says nothing; train it first, "
            "or use the folder of a reward model"
        )
    if others := sorted(missing - new):
        raise ModelError(
            f"{path} lacks weights of a model with a {head} head: {', '.join(others[:4])}"
            f"{', ...' if len(others) > 4 else ''}; they would be drawn at random. A reward model has no vocabulary "
            "head, for example: start from the model that it was made of"
        )


@contextmanager
def _without_report() -> Generator[None]:
    """Transformers prints no table of weights that are missing or not used: `_refuse_drawn` looks at them."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _refusing(what: str, path: str, remedy: str | None = None) -> Generator[None]:
    """What transformers, or the model's own code, raises while something is loaded, as a ModelError."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{path} comes with Python code of its own, which is not run: model.trust_remote_code is false\n"
                "  read the code, and if you trust it set model.trust_remote_code=true; it then runs in the driver and "
                "in every worker"
            ) from None
        said = shorten(str(error), 250, placeholder=" ...")  # it may list every model that there is
        raise ModelError(f"cannot load {what} from {path}: {said}{f'; {remedy}' if remedy else ''}") from error


def _holds_weights(name: str) -> bool:
    if name.startswith("adapter_"):
        return False
    return name.endswith((".safetensors", ".bin")) or ".index.json" in name

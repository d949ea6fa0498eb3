"""`hf:NAME_OR_DIR` → an image or text classifier of Transformers that returns its logits."""

import contextlib
import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twofour.errors import InputError, MissingExtraError
from twofour.sources.torchvision_compat import import_torchvision

log = logging.getLogger(__name__)
EXTRA = "models named hf:NAME need Transformers; pip install 'twofour[hf]'"


def logits(module: nn.Module, arguments: Any, output: Any) -> Tensor:
    """Return the logits in a classifier's output: the forward hook that every `hf:` model carries, so that its names stay its own."""
    found: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Transformers and the hub tell of new heads and failed requests in their own ways; what matters here is logged or raised."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as their_logging

    before, hub_before = their_logging.get_verbosity(), hub_logging.get_verbosity()
    their_logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.CRITICAL)
    bars = their_logging.is_progress_bar_enabled()
    their_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        their_logging.set_verbosity(before)
        hub_logging.set_verbosity(hub_before)
        if bars:
            their_logging.enable_progress_bar()


def _config_of(name: str) -> Any:
    from transformers import AutoConfig

    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"model {f'hf:{name}'!r}: the folder has no config.json, expected one saved by save_pretrained")
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or name.endswith("/")):
        raise InputError(
            f"model {f'hf:{name}'!r}: the folder {name!r} does not exist; name a folder with config.json, or a model on the hub"
        )
    if path.is_file() and path.suffix != ".json":
        raise InputError(f"model {f'hf:{name}'!r} is a file, expected a folder, a config.json or a name on the hub")
    try:
        with _quiet():
            if not path.exists():
                return AutoConfig.from_pretrained(name, trust_remote_code=False)
            # Read here first: Transformers would look for a damaged or unnamed file on the hub.
            file = path if path.is_file() else path / "config.json"
            if "model_type" not in json.loads(file.read_text(encoding="utf-8")):
                raise InputError(f"model {f'hf:{name}'!r}: {file.name} names no model_type, expected the config of a Transformers model")
            return AutoConfig.from_pretrained(file.parent if path.is_dir() else file, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:
        # The hub, the file system and the config's own checks raise dozens of kinds.
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"model {f'hf:{name}'!r} is neither a folder with config.json nor to be had from the hub: {reason}") from error


def _auto_class(config: Any, name: str) -> Any:
    """Return the auto class of the config's task: what its architecture says, else what its model type has."""
    from transformers import AutoModelForImageClassification as Images
    from transformers import AutoModelForSequenceClassification as Text

    said = " ".join(getattr(config, "architectures", None) or ())
    kinds = [kind for kind in (Images, Text) if type(config) in kind._model_mapping]
    if not kinds:
        raise InputError(f"model {f'hf:{name}'!r} is a {config.model_type}, which has no image or text classifier in Transformers")
    return Images if Images in kinds and (len(kinds) == 1 or "ForImageClassification" in said) else Text


def huggingface_model(name: str) -> Callable[[int], nn.Module]:
    """Return what makes the classifier of a folder, a config file or a hub name.

    A folder with safetensors starts from its weights; a head that has another number of classes is made anew. A config alone starts from
    the global seed. Only safetensors are read and no code of the folder is run.

    Raises:
        InputError: there is no such model, or it is no classifier. MissingExtraError: Transformers is not installed.
    """
    with contextlib.suppress(MissingExtraError):
        import_torchvision()
    try:
        import transformers  # noqa: F401 - only to know that it is there
    except ModuleNotFoundError as error:
        raise MissingExtraError(EXTRA) from error
    config = _config_of(name)
    kind = _auto_class(config, name)
    path = Path(name)
    weights = not path.exists() or (path.is_dir() and any(path.glob("*.safetensors")))

    def make(num_classes: int) -> nn.Module:
        own = type(config).from_dict({**config.to_dict(), "num_labels": num_classes, "id2label": None, "label2id": None})
        own.num_labels = num_classes
        try:
            with _quiet():
                if weights:
                    model, info = kind.from_pretrained(
                        name,
                        config=own,
                        use_safetensors=True,
                        trust_remote_code=False,
                        ignore_mismatched_sizes=True,
                        output_loading_info=True,
                        dtype=torch.float32,
                    )
                    _tell_new(name, info)
                else:
                    model = kind.from_config(own).float()
        except Exception as error:
            # Whatever the hub, the files or the network's own code raise.
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise InputError(f"model {f'hf:{name}'!r} cannot be made: {reason}") from error
        module: nn.Module = model
        module.register_forward_hook(logits)
        return module

    return make


def _tell_new(name: str, info: dict[str, Any]) -> None:
    new = sorted({*info["missing_keys"], *(key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"])})
    if new:
        log.warning("hf:%s: %d tensors are not in its files or have another shape, they start anew: %s", name, len(new), new[:4])

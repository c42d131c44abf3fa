"""The model as it is trained: what is frozen, adapters beside it, and what makes it faster without changing its results."""

from collections import deque
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from surf import adapters
from surf.config import Finetune, Lvlm
from surf.errors import SurfError
from surf.models import fused
from surf.processing import stop_at_end
from surf.training import loss, packing

PACKAGES = {"lora": ["peft"], "qlora": ["peft", "bitsandbytes"]}  # by finetune.method; each method is an extra of that name


def load(lvlm: Lvlm, finetune: Finetune, processor: Any, arguments: Any, checkpoint: str | None) -> tuple[Any, int]:
    """The model ready to train, and the number of its parameters that are trained.

    Args:
        checkpoint: folder to go on from. Without DeepSpeed its weights are read here; DeepSpeed reads them itself.

    Raises:
        SurfError: a package is missing, the model cannot be loaded, or no parameter has any of `finetune.train` in its name.
    """
    from transformers import set_seed
    from transformers.utils.logging import disable_progress_bar

    require(finetune.method)
    disable_progress_bar()
    set_seed(arguments.seed)
    mine = checkpoint if checkpoint and not arguments.deepspeed else None
    source = mine if mine and finetune.method == "full" else lvlm.model
    model = _pretrained(lvlm, source, dtype=dtype(arguments), **_quantised(finetune))
    return prepare(model, finetune, processor, mine)


def dtype(arguments: Any) -> Any:
    """DeepSpeed keeps float32 master weights itself; without it the weights are the masters, and autocast does the rest."""
    import torch

    return torch.bfloat16 if arguments.bf16 and arguments.deepspeed else torch.float32


def prepare(model: Any, finetune: Finetune, processor: Any, adapter: str | None = None) -> tuple[Any, int]:
    """`model` as it is trained: switches of speed, frozen but for `finetune.train`, or with adapters (those of a checkpoint).

    Returns:
        the model, and the number of its parameters that are trained.
    """
    import torch

    stop_at_end(model, processor)
    _speed_up(model, finetune, processor)
    text, layers = _text(model), decoder(model)
    names = trained(model, finetune)
    if finetune.method == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
    else:
        model = _with_adapter(model, finetune, names, adapter)
    if torch.cuda.is_available() if finetune.compile is None else finetune.compile:
        fused.enable(text, layers)  # behind the adapters: what is trained and what is not are compiled differently
    sizes = [getattr(weight, "ds_numel", weight.numel()) for weight in model.parameters() if weight.requires_grad]
    return model, sum(sizes)  # ZeRO-3 leaves an empty shell of a parameter, and its size in ds_numel


def require(method: str) -> None:
    """Raise a SurfError if a package that `finetune.method` needs is not installed."""
    for package in PACKAGES.get(method, []):
        if not find_spec(package):
            where, command = f"finetune.method: {method}", f"pip install 'surf-rag[{method}]'"
            raise SurfError(f"{package} is not installed", where=where, next=command)


def trained(model: Any, finetune: Finetune) -> set[str]:
    """Names of the parameters that are trained, or that get adapters beside them: those of linear layers, but the output head.

    Raises:
        SurfError: there are none.
    """
    named = {name for name, _ in model.named_parameters() if any(part in name for part in finetune.train)}
    found = named if finetune.method == "full" else named & {f"{name}.weight" for name in _linear(model)}
    if not found:
        top = sorted({".".join(name.split(".")[:2]) for name, _ in model.named_parameters()})
        what = "linear layer" if named else "parameter"
        what = f"no {what} of the model has any of {finetune.train} in its name"
        raise SurfError(what, where="finetune.train", expected=f"parts of names such as {', '.join(top)}")
    return found


def packs(finetune: Finetune, processor: Any) -> bool:
    """Whether the samples of a batch stand in one row."""
    return finetune.packing and adapters.of(processor).packs


def merged(lvlm: Lvlm, folder: Path) -> Any:
    """The base model with the adapter of `folder` added to its weights, in the base model's precision."""
    import torch
    from peft import PeftModel
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else ZeRO-3 would spread this model over processes that do not take part
    model = _pretrained(lvlm, lvlm.model, dtype=getattr(torch, lvlm.dtype))
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def _pretrained(lvlm: Lvlm, source: str, **options: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    try:
        return AutoModelForImageTextToText.from_pretrained(source, use_safetensors=True, attn_implementation="sdpa", **options)
    except (OSError, ValueError) as error:
        what = f"cannot be loaded ({str(error).strip().splitlines()[0]})"
        raise SurfError(what, where=f"lvlm.model {lvlm.model}", expected="a model with safetensors weights") from None


def decoder(model: Any) -> list[Any]:
    """The layers of the language model."""
    from transformers import modeling_layers

    return [module for module in _text(model).modules() if isinstance(module, modeling_layers.GradientCheckpointingLayer)]


def _text(model: Any) -> Any:
    return getattr(model.model, "language_model", None) or getattr(model.model, "text_model", None) or model


def _speed_up(model: Any, finetune: Finetune, processor: Any) -> None:
    """Levers that change no result beyond float noise; each is a knob of the config."""
    if finetune.loss_chunk and adapters.of(processor).lean:
        loss.enable(model, finetune.loss_chunk)
    if packs(finetune, processor):
        packing.enable(model)
    layers = decoder(model)
    if finetune.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for number in range(min(finetune.keep_layers, len(layers))):
            # evenly spread: what is kept and what is computed again take turns
            layers[number * len(layers) // finetune.keep_layers].gradient_checkpointing = False
    if finetune.zero_stage == 3 and finetune.gather_layers and layers:
        _gather_whole(model, finetune, layers)


def _gather_whole(model: Any, finetune: Finetune, layers: list[Any]) -> None:
    """ZeRO-3 gathers a layer's matrices by one call, under one hook: those of the language model, and frozen ones elsewhere."""
    from deepspeed.utils import set_z3_leaf_module
    from transformers.modeling_layers import GradientCheckpointingLayer

    def trained(prefix: str, module: Any) -> bool:
        return any(part in name for name, _ in module.named_parameters(prefix=prefix) for part in finetune.train)

    for prefix, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and (module in layers or not trained(prefix, module)):
            set_z3_leaf_module(module, True)
    _keep_host_near(layers)


def _keep_host_near(layers: list[Any]) -> None:
    """Let the host run at most two layers ahead of the GPU.

    It would else order all layers' weights to be gathered before the first of them can be released, and the memory of the
    whole model with them; PyTorch's FSDP has `limit_all_gathers` for the same reason.
    """
    import torch

    if not torch.cuda.is_available():
        return
    begun: deque[Any] = deque()

    def wait(*_: Any) -> None:
        if len(begun) == 2:
            begun.popleft().synchronize()
        begun.append(torch.cuda.Event())
        begun[-1].record()

    for layer in layers:
        layer.register_forward_pre_hook(wait)


# --- adapters beside the weights ---------------------------------------------------------------------------------------


def _with_adapter(model: Any, finetune: Finetune, names: set[str], checkpoint: str | None) -> Any:
    """LoRA (Hu et al. 2021, arXiv 2106.09685) on every linear layer whose weight is among `names`, see `trained`."""
    require(finetune.method)
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    if finetune.method == "qlora":
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    elif finetune.gradient_checkpointing:
        model.enable_input_require_grads()
    if checkpoint:
        return PeftModel.from_pretrained(model, checkpoint, is_trainable=True)
    linear = [name for name in _linear(model) if f"{name}.weight" in names]
    lora = finetune.lora
    options = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=linear)
    return get_peft_model(model, options)


def _linear(model: Any) -> list[str]:
    """Names of the linear layers, but the output head."""
    import torch

    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head]


def _quantised(finetune: Finetune) -> dict[str, Any]:
    """QLoRA's four bits (Dettmers et al. 2023, arXiv 2305.14314): NF4, quantised twice; the vision side stays as it is."""
    if finetune.method != "qlora":
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    cuda = torch.cuda.is_available()
    names = ["vision_tower", "vision_model", "visual", "multi_modal_projector", "connector"]
    skipped = ["lm_head", *names, *(f"model.{name}" for name in names)]  # they are matched with the starts of modules' names
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if cuda else torch.float32,
        llm_int8_skip_modules=skipped,
    )
    return {"quantization_config": four, "device_map": {"": torch.cuda.current_device() if cuda else "cpu"}}

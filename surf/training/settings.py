"""The config's section `finetune`."""

from typing import Literal

from pydantic import Field, model_validator

from surf.sections import KNOB, Name, Positive, Section, Share


class Lora(Section):
    """Adapters beside the weights, for finetune.method lora and qlora. Defaults are those of LLaVA's own LoRA recipe."""

    rank: Positive = Field(default=128, description="Rank of the adapters.")
    alpha: Positive = Field(default=256, description="Scale of the adapters; they are multiplied by alpha / rank.")
    dropout: float = Field(default=0.05, ge=0, lt=1, description="Share of an adapter's inputs that are left out.")
    merge: bool = Field(default=True, description="Write the whole model; false: the adapter alone.")


class Finetune(Section):
    """DeepSpeed fine-tune. Defaults are the original's hyper-parameters."""

    processes: Positive = Field(default=1, description="Processes (one a GPU) on each node.")
    nodes: Positive = Field(default=1, description="Nodes; more than one needs SLURM.")
    method: Literal["full", "lora", "qlora"] = Field(
        default="full", description="Train the weights, adapters beside them, or adapters beside four-bit weights (GPU)."
    )
    lora: Lora = Field(default=Lora(), description="Adapters, for method lora and qlora.")
    epochs: float = Field(default=2, gt=0, description="Passes over the pairs.")
    learning_rate: float = Field(default=1e-5, gt=0, description="Peak of the cosine schedule.")
    warmup_ratio: Share = Field(default=0.03, description="Share of the steps with a rising learning rate.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW weight decay.")
    batch_size: Positive = Field(default=16, description="Samples a process and step.")
    accumulation: Positive = Field(default=1, description="Steps whose gradients are added up.")
    group_by_length: bool = Field(
        default=False, description="Samples of similar length share a step: less waiting of one process for another."
    )
    max_tokens: Positive = Field(
        default=4096, description="Longest training sample. Captions are cut to fit; a question or an answer never is."
    )
    verdict: bool = Field(
        default=False,
        description="The answer is followed by a line that says which references were useful. Evaluation takes it off again.",
    )
    train: list[Name] = Field(
        default=["language_model", "text_model", "lm_head", "multi_modal_projector", "connector", "merger"],
        description="Parameters whose name contains one of these are trained; all others, the vision tower, are frozen. "
        "The default holds the names of all tested families.",
    )
    zero_stage: int = Field(default=3, ge=0, le=3, description="DeepSpeed ZeRO stage; 0 is plain data parallelism.")
    offload: Literal["none", "optimizer", "all"] = Field(
        default="none", description="Keep the optimizer, or all, in the CPU's memory. Needs ZeRO."
    )
    gradient_checkpointing: bool = Field(
        json_schema_extra=KNOB, default=True, description="Recompute activations to save memory."
    )
    keep_layers: int = Field(
        json_schema_extra=KNOB, default=0, ge=0, description="Layers whose activations are kept all the same, if memory allows."
    )
    packing: bool = Field(
        json_schema_extra=KNOB, default=True, description="No padding: samples stand in one row, where the model allows it."
    )
    loss_chunk: int = Field(
        json_schema_extra=KNOB,
        default=2048,
        ge=0,
        description="Positions whose logits are in memory at one time, of those with loss; 0: all logits of all positions.",
    )
    gather_layers: bool = Field(
        json_schema_extra=KNOB, default=True, description="ZeRO-3 gathers whole layers, not matrix by matrix."
    )
    compile: bool | None = Field(
        json_schema_extra=KNOB,
        default=None,
        description="Compile what stands between the language model's matrix products: norms, gated activations, rotary "
        "positions. Takes seconds at the start; null: with a GPU.",
    )
    workers: int | None = Field(
        json_schema_extra=KNOB,
        default=None,
        ge=0,
        description="Processes that decode images, for each training process; null: 4 with a GPU, else none.",
    )
    save_steps: Positive = Field(json_schema_extra=KNOB, default=50, description="Steps between two checkpoints.")
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        json_schema_extra=KNOB, default=[], description="Trackers that get every step's figures."
    )

    @model_validator(mode="after")
    def _fits(self) -> "Finetune":
        if self.offload != "none" and not self.zero_stage:
            raise ValueError(f"finetune.offload: {self.offload} needs finetune.zero_stage 1 to 3")
        if self.method == "qlora" and self.zero_stage == 3:
            raise ValueError("finetune.method: qlora needs finetune.zero_stage 0 to 2: four-bit weights cannot be spread")
        return self

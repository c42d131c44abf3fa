"""What every section of the config is made of. They stand in `config`, `modelsettings`, `methods` and `training.settings`."""

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(min_length=1)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # becomes part of a file name


# How a key reaches its stage. Keys without a role change results: they are flags, and a change reruns the stage.
KNOB: JsonDict = {"role": "knob"}  # speed and places only: a flag, but a change reruns nothing
WORKFLOW: JsonDict = {"role": "workflow"}  # read by the Snakefile, no flag


class Section(BaseModel):
    """Settings of one stage. Frozen, typed, and refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    version: ClassVar[int] = 1

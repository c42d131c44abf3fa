"""The model's README: a card that can be published as it is, and says what produced the model."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surf import store

_CARD = """---
base_model: {base_model}
library_name: transformers
pipeline_tag: image-text-to-text
tags: [retrieval-augmented, surf]
---

# {name}

`{base_model}`, fine-tuned with surf {package} to use retrieved image-caption pairs selectively (the method: SURf, EMNLP 2024,
arXiv 2409.14083).

| | |
|---|---|
| training samples | {samples}, digest `{pairs}` |
| trained | {trainable_parameters:,} parameters, {method} |
| steps, epochs | {steps}, {epochs:g} |
| loss | {first:.4f} at the first step, {loss:.4f} at the last |
| seed | {seed} |

## Use

The prompt holds the references first, the image in question last; `surf.prompts` builds it, layout `{layout}`:

```
{prompt}
```

## Loss

| step | loss | learning rate |
|---|---|---|
{curve}

## Config

Everything that produced this model also stands in `model.json`.

```
{flags}
```

## To be filled in before publication

- License: that of the base model and of the training data.
- Training data: sources of the questions, the corpus of references and its captions.
- Evaluation: the tables of `report.html`.
- Limits: languages, domains, and what a wrong reference does to an answer.
"""


def write(folder: Path, result: dict[str, Any], *, method: str, layout: str, prompt: str) -> None:
    """Write `README.md` for the model whose `model.json` holds `result`."""
    curve: Sequence[dict[str, Any]] = result["loss_curve"]
    every = math.ceil(len(curve) / 20)
    shown = [*curve[:: max(every, 1)], *([curve[-1]] if (len(curve) - 1) % max(every, 1) else [])]
    rows = "\n".join(f"| {one['step']} | {one['loss']:.4f} | {one['lr']:.2e} |" for one in shown)
    flags = result["flags"].replace(" --", "\n--")
    facts = {**result, "curve": rows, "flags": flags, "first": curve[0]["loss"], "name": folder.name}
    store.write_text(folder / "README.md", _CARD.format(**facts, method=method, layout=layout, prompt=prompt))

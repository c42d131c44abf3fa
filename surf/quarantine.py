"""Rows that could not be used: written down, counted, and too many of them stop the run."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from surf import files, store
from surf.errors import SurfError, first_of

log = logging.getLogger("surf")


def settle(path: Path, errors: Mapping[str, str], *, dataset: str, stage: str, total: int, max_bad_share: float) -> None:
    """Write the quarantine of one part, or refuse to go on.

    Args:
        errors: what is wrong, by the key of the row or image.
        total: rows or images that the stage looked at.

    Raises:
        SurfError: more than `max_bad_share` of them are bad. It names the first few; all of them stand in a text file beside
            `path`, since Snakemake removes what a failed job declared.
    """
    refused = path.with_suffix(".refused.tsv")
    refused.unlink(missing_ok=True)
    if len(errors) > max_bad_share * total:
        lines = [f"{json.dumps(key)[1:-1]}\t{json.dumps(error)[1:-1]}\n" for key, error in sorted(errors.items())]
        files.write_text(refused, "".join(lines))
        raise SurfError(
            f"{len(errors)} of {total} rows are unusable ({first_of(errors)})",
            where=dataset,
            expected=f"at most a share of {max_bad_share} (images.max_bad_share)",
            next=f"see {refused}; mend the data, or raise images.max_bad_share in config.yaml",
        )
    if errors:
        log.warning("%d of %d %s in quarantine, see %s", len(errors), total, dataset, path)
    rows = [{"dataset": dataset, "key": key, "stage": stage, "error": error} for key, error in sorted(errors.items())]
    store.write_table(path, store.table_of(rows, "quarantine"), "quarantine")

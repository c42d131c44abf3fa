"""Captions of whole images: MS-COCO, its Karpathy split, VizWiz-Captions. Scored by CIDEr-D, BLEU-4 and ROUGE-L.

Sources of the file formats: cocodataset.org, "data format" (Chen et al. 2015, arXiv 1504.00325); cs.stanford.edu/people/
karpathy/deepimagesent (Karpathy and Fei-Fei 2015, arXiv 1412.2306); vizwiz.org, task "image captioning" (Gurari et al. 2020,
arXiv 2002.08565).
"""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from surf.errors import SurfError
from surf.tasks import captioning, files
from surf.tasks.base import Question, mean

log = logging.getLogger("surf")
suffix = ""
QUESTION = "Provide a one-sentence caption for the provided image."  # as LLaVA-1.5 learns captions, from TextCaps
_EXPECTED = "caption annotations: {images, annotations} as MS-COCO's, or {images} with sentences as Karpathy's"


def read(path: Path, split: str) -> list[Question]:
    """One question an image, with all its captions. The file's keys say which format it has:

    - MS-COCO: {images: [{id, file_name, …}], annotations: [{image_id, caption, …}]}. An image whose coco_url names the folder
      of 2017 is called `val2017/000000000139.jpg`, others by their file_name.
    - VizWiz-Captions: the same; captions marked is_rejected or is_precanned are left out, as its evaluation does, and so are
      images with no other caption. Both are counted in the log.
    - Karpathy's: {images: [{filename, split, cocoid, sentences: [{raw}]}]}; `split` (test, val, train, restval) picks images.

    Raises:
        SurfError: another format, a missing key, a caption of an unknown image, an image without captions, a split that
            the file does not have.
    """
    content = files.load(path, _EXPECTED)
    if not isinstance(content, dict) or "images" not in content:
        raise SurfError(f"holds {files.short(content)}", where=str(path), expected=_EXPECTED)
    images = files.items(content["images"], f"{path}, images", _EXPECTED)
    if "annotations" in content:
        return files.unique(_coco(images, files.items(content["annotations"], f"{path}, annotations", _EXPECTED), split))
    return files.unique(_karpathy(images, path, split))


def _coco(
    images: list[tuple[str, files.Row]], annotations: list[tuple[str, files.Row]], split: str
) -> Iterator[tuple[str, Question]]:
    captions: dict[int | str, list[str]] = {files.number(row, "id", place): [] for place, row in images}
    left_out = 0
    for place, row in annotations:
        key = files.number(row, "image_id", place)
        if key not in captions:
            raise SurfError(f"image_id {key} is not among the images", where=place, expected="the id of an image of the file")
        if row.get("is_rejected") or row.get("is_precanned"):
            left_out += 1
        else:
            captions[key].append(files.text(row, "caption", place, empty=True))
    empty = 0
    for place, row in images:
        key = files.number(row, "id", place)
        if captions[key]:
            yield place, _question(f"{split}#{key}", _name(row, place), captions[key])
        elif not left_out:
            raise SurfError(f"image {key} has no caption", where=place, expected="at least one annotation of each image")
        else:
            empty += 1
    if left_out:
        log.info("%d captions are marked as rejected or precanned and left out, %d images have no other", left_out, empty)


def _name(row: files.Row, place: str) -> str:
    name = files.text(row, "file_name", place)
    folder = re.search(r"/((?:train|val|test|unlabeled)2017)/", str(row.get("coco_url")))
    return f"{folder[1]}/{name}" if folder and "/" not in name else name


def _karpathy(images: list[tuple[str, files.Row]], path: Path, split: str) -> Iterator[tuple[str, Question]]:
    splits = {files.text(row, "split", place) for place, row in images}
    if split not in splits:
        raise SurfError(f"has no split {split!r}", where=str(path), expected=f"one of {', '.join(sorted(splits))}")
    for place, row in images:
        if row["split"] == split:
            sentences = files.items(row.get("sentences"), f"{place}, sentences", "a list of {raw}")
            key = files.number(row, "cocoid" if "cocoid" in row else "imgid", place)
            captions = [files.text(entry, "raw", where, empty=True) for where, entry in sentences]
            yield place, _question(f"{split}#{key}", files.text(row, "filename", place), captions)


def _question(key: str, image: str, captions: list[str]) -> Question:
    return Question(question_id=key, image=image, question=QUESTION, answers=captions, choices=None, category=None)


def score(responses: Sequence[str], questions: Sequence[Question]) -> list[float]:
    """A tenth of each response's CIDEr-D, in [0, 1]; it depends on the other questions (see `captioning.cider_d`)."""
    return [value / 10 for value in captioning.cider_d(*_words(responses, questions))]


def metrics(responses: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """CIDEr-D in [0, 10], BLEU-4 and ROUGE-L in [0, 1], all as the COCO evaluation server prints them; papers print 100 times.

    Raises:
        SurfError: the extra `captions` is not installed.
    """
    said, wanted = _words(responses, questions)
    return {
        "CIDEr-D": mean(captioning.cider_d(said, wanted)),
        "BLEU-4": captioning.bleu(said, wanted),
        "ROUGE-L": captioning.rouge_l(said, wanted),
    }


def chance(questions: Sequence[Question]) -> float | None:
    """None: no caption is a guess."""
    return None


def _words(responses: Sequence[str], questions: Sequence[Question]) -> tuple[list[list[str]], list[list[list[str]]]]:
    said = [captioning.words(response) for response in responses]
    return said, [[captioning.words(answer) for answer in question["answers"]] for question in questions]

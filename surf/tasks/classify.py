"""One class of several: the response must name the image's class and no other. CIFAR-10, EmoSet, folders by class.

Sources of the file formats: cs.toronto.edu/~kriz/cifar.html and the data set uoft-cs/cifar10 on the Hugging Face hub
(Krizhevsky 2009); github.com/JingyuanYY/EmoSet (Yang et al. 2023, arXiv 2307.07961).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from surf.errors import SurfError
from surf.tasks import files, packed
from surf.tasks.base import Question, mean
from surf.tasks.choice import named

suffix = "\nAnswer the question using a single word or phrase."

# Mikels' eight emotions, in EmoSet's order.
EMOTIONS = ("amusement", "awe", "contentment", "excitement", "anger", "disgust", "fear", "sadness")
# Other names of a class. They count unless they are a class themselves.
SYNONYMS = {"airplane": ("plane", "aeroplane"), "automobile": ("car",)}
_PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}
_ASK = "What does the image show? Choose one of: {}."
_ASK_EMOTION = "Which emotion does the image evoke? Choose one of: {}."


def read(path: Path, split: str) -> list[Question]:
    """Images with one class each. What `path` is decides:

    - EmoSet's `test.json`: a JSON list of [emotion, image_id, image path, annotation path]; the image path is the name.
    - CIFAR-10's binary version: a `.bin` file, or the folder of the batches, of which `split` (train or test) picks some.
    - A hub Parquet file with columns `img` or `image`, and `label`, whose class names stand in the schema.
    - A folder of one folder for each class; images are named CLASS/FILE.

    Images of CIFAR-10 and Parquet files are named as `surf.tasks.unpack` names them. CIFAR-10's Python version is refused:
    reading a pickle can run code.

    Raises:
        SurfError: none of these; an unknown class.
    """
    if path.is_dir() and not any(path.glob("*_batch*")):
        return _folder(path, split)
    if path.suffix == ".json":
        return _emoset(path, split)
    if path.suffix == ".parquet":
        return _hub(path, split)
    _refuse_pickle(path)
    return files.unique(
        (place, _question(f"{split}#{number}", packed.name(pixels), packed.CIFAR10[label], packed.CIFAR10))
        for number, (place, label, pixels) in enumerate(packed.cifar10(path, split))
    )


def _question(key: str, image: str, label: str, classes: Sequence[str], ask: str = _ASK) -> Question:
    return Question(
        question_id=key,
        image=image,
        question=ask.format(", ".join(classes)),
        answers=[label],
        choices=list(classes),
        category=None,
    )


def _emoset(path: Path, split: str) -> list[Question]:
    expected = "a JSON list of [emotion, image_id, image path, annotation path], as EmoSet's test.json"

    def questions() -> Iterator[tuple[str, Question]]:
        for place, row in files.items(files.load(path, expected), str(path), expected, list):
            if len(row) < 3 or not all(isinstance(entry, str) and entry for entry in row[:3]):
                raise SurfError(f"is {files.short(row)}", where=place, expected=expected)
            label, key, image = row[:3]
            if label not in EMOTIONS:
                raise SurfError(f"emotion is {label!r}", where=place, expected=f"one of {', '.join(EMOTIONS)}")
            yield place, _question(f"{split}#{key}", image, label, EMOTIONS, _ASK_EMOTION)

    return files.unique(questions())


def _hub(path: Path, split: str) -> list[Question]:
    rows = list(packed.rows(path))
    classes = [name.replace("_", " ") for name in packed.class_names(path)]
    if not classes:
        raise SurfError(
            "does not name its classes",
            where=str(path),
            expected="a Parquet file of the library datasets, whose label is a ClassLabel",
        )
    questions = []
    for number, (place, row, data) in enumerate(rows):
        label = row.get("label")
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(classes):
            raise SurfError(f"label is {label!r}", where=place, expected=f"a number from 0 to {len(classes) - 1}")
        questions.append(_question(f"{split}#{number}", packed.name(data), classes[label], classes))
    return questions


def _folder(path: Path, split: str) -> list[Question]:
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir())
    if len(folders) < 2:
        raise SurfError(f"holds {len(folders)} folders", where=str(path), expected="one folder for each class")
    classes = [folder.name.replace("_", " ") for folder in folders]
    questions = []
    for folder, label in zip(folders, classes, strict=True):
        names = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in _PICTURES)
        if not names:
            raise SurfError("holds no images", where=str(folder), expected=f"files ending in {', '.join(sorted(_PICTURES))}")
        images = [str(PurePosixPath(folder.name, name)) for name in names]
        questions += [_question(f"{split}#{image}", image, label, classes) for image in images]
    return questions


def _refuse_pickle(path: Path) -> None:
    batches = sorted(path.glob("*_batch*")) if path.is_dir() else [path]
    for batch in batches:
        if batch.suffix != ".bin" and batch.is_file() and batch.read_bytes()[:1] == b"\x80":
            raise SurfError(
                "is a Python pickle; reading one can run code, so surf reads none",
                where=str(batch),
                expected="CIFAR-10's binary version (cifar-10-batches-bin) or a Parquet file",
                next="download cifar-10-binary.tar.gz in its place",
            )


def score(responses: Sequence[str], questions: Sequence[Question]) -> list[float]:
    """1.0 where the response names the class and no other (see `surf.tasks.choice.named`), else 0.0."""
    return [
        float(_class(response, question["choices"] or []) == question["answers"][0])
        for response, question in zip(responses, questions, strict=True)
    ]


def metrics(responses: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """accuracy, and unparsed (responses that name no class or several), in [0, 1]."""
    lost = [float(_class(text, row["choices"] or []) is None) for text, row in zip(responses, questions, strict=True)]
    return {"accuracy": mean(score(responses, questions)), "unparsed": mean(lost)}


def chance(questions: Sequence[Question]) -> float | None:
    """What the best single class scores: the commonest class's share."""
    labels = Counter(question["answers"][0] for question in questions)
    return max(labels.values()) / len(questions) if labels else None


def _class(response: str, classes: Sequence[str]) -> str | None:
    owners = {name: name for name in classes}
    for name in classes:
        for other in SYNONYMS.get(name, ()):
            owners.setdefault(other, name)
    names = list(owners)
    place = named(response, names)
    if place is not None:
        return owners[names[place]]
    # "a car, an automobile": two names of one class
    found = {owners[name] for name in names if named(response, [name]) is not None}
    return found.pop() if len(found) == 1 else None

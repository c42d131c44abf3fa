"""POPE files in small, for tests."""

import json
import random

OBJECTS = ["dog", "car", "dining table", "person", "apple", "snowboard"]


def question_rows(images=8, seed=0):
    """A POPE file in small: six questions about every image, numbered from 1."""
    rng = random.Random(seed)
    rows = []
    for image in range(images):
        for number, thing in enumerate(OBJECTS):
            rows.append(
                {
                    "question_id": len(rows) + 1,
                    "image": f"COCO_val2014_{image:012d}.jpg",
                    "text": f"Is there {'an' if thing[0] == 'a' else 'a'} {thing} in the image?",
                    "label": "yes" if rng.random() < (0.9 if number < 3 else 0.1) else "no",
                }
            )
    return rows


def answer_rows(questions, flip=(), **extra):
    """Answers in the original's own format, right but for the ids in `flip`."""
    return [
        {
            "question_id": row["question_id"],
            "prompt": row["text"],
            "filenames": ["coco/train2017/000000014307.jpg", "coco/train2017/000000193634.jpg"],
            "text": "Yes" if (row["label"] == "yes") != (row["question_id"] in flip) else "No",
            "answer_id": f"id{row['question_id']}",
            "model_id": "SURf-7B",
            "metadata": {},
            **extra,
        }
        for row in questions
    ]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

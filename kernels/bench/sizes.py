"""The measured models and batches as data: full sizes for a GPU, toy sizes for a CPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """The parameters of a model that determine the cost of a step."""

    name: str
    num_layers: int
    dim: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    interval: int  # a gated layer precedes every `interval`-th layer
    media_heads: int
    media_head_dim: int
    media_dim: int
    num_latents: int = 64
    ffn_matrices: int = 2  # of a feed-forward; 3 in SwiGLU

    @property
    def gated_layers(self) -> int:
        return len(range(self.interval - 1, self.num_layers, self.interval))

    @property
    def media_inner(self) -> int:
        return self.media_heads * self.media_head_dim

    @property
    def step_params(self) -> int:
        """Return the number of parameters that one decode step reads; media keys and values are cached."""
        feed_forward = self.ffn_matrices * self.dim * self.ffn_dim
        layer = 4 * self.dim**2 + feed_forward
        gated = 2 * self.dim * self.media_inner + feed_forward
        return self.num_layers * layer + self.vocab_size * self.dim + self.gated_layers * gated

    @property
    def text_bytes(self) -> int:
        """Return the bytes of the keys and values of one token in all layers, in 16 bits."""
        return self.num_layers * 2 * self.dim * 2

    @property
    def media_bytes(self) -> int:
        return self.gated_layers * 2 * self.num_latents * self.media_inner * 2


OF_3B = Spec(
    name="OF-3B", num_layers=24, dim=2048, num_heads=16, head_dim=128, ffn_dim=8192, vocab_size=50434, interval=1,
    media_heads=8, media_head_dim=64, media_dim=1024,
)  # fmt: skip
OF_9B = Spec(
    name="OF-9B", num_layers=32, dim=4096, num_heads=32, head_dim=128, ffn_dim=16384, vocab_size=50434, interval=4,
    media_heads=8, media_head_dim=64, media_dim=1024,
)  # fmt: skip
IDEFICS_9B = Spec(
    name="IDEFICS-9B", num_layers=32, dim=4096, num_heads=32, head_dim=128, ffn_dim=11008, vocab_size=32002, interval=4,
    media_heads=32, media_head_dim=128, media_dim=1280, ffn_matrices=3,
)  # fmt: skip
TOY = Spec(
    name="toy", num_layers=2, dim=64, num_heads=4, head_dim=16, ffn_dim=128, vocab_size=320, interval=2,
    media_heads=2, media_head_dim=16, media_dim=32, num_latents=8,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes of one run of the benchmark."""

    core: tuple[Spec, ...]
    models: tuple[Spec, ...]
    decode: tuple[int, ...]  # sequences
    core_decode: tuple[int, ...]
    prefill: tuple[int, ...]  # tokens
    step: tuple[int, ...]
    shots: int
    shot_tokens: int
    query_tokens: int
    pool_bytes: int  # bytes of the pages through which the launches of one measurement cycle
    read_bytes: int
    matmul: int
    resampler_images: int
    launches: int  # per graph
    replays: int
    compile: bool  # measure the baselines that need torch.compile

    def spec(self, name: str) -> Spec:
        return next(spec for spec in (*self.core, *self.models) if spec.name == name)

    @property
    def images(self) -> int:
        return self.shots + 1

    @property
    def shared_tokens(self) -> int:
        return self.shots * self.shot_tokens

    @property
    def context(self) -> int:
        """The tokens of a sequence: the shots and the query."""
        return self.shared_tokens + self.query_tokens


FULL = Sizes(
    core=(OF_9B, IDEFICS_9B), models=(OF_3B, OF_9B, IDEFICS_9B), decode=(1, 8, 64), core_decode=(1, 8, 64, 512),
    prefill=(960, 8192), step=(1, 8, 64), shots=32, shot_tokens=30, query_tokens=20, pool_bytes=1 << 30,
    read_bytes=4 << 30, matmul=8192, resampler_images=16, launches=32, replays=50, compile=True,
)  # fmt: skip
SMALL = Sizes(
    core=(TOY,), models=(TOY,), decode=(1, 3), core_decode=(1, 3), prefill=(48,), step=(1, 2), shots=4,
    shot_tokens=8, query_tokens=4, pool_bytes=1 << 16, read_bytes=1 << 20, matmul=64, resampler_images=1,
    launches=2, replays=2, compile=False,
)  # fmt: skip
SIZES = {"full": FULL, "quick": SMALL}

"""What a row of work costs, exactly: floating-point operations of every part, forward and backward.

A multiply-add counts 2. Counted are matrix products and attention, and nothing that a perfect program would leave out: causal attention is
half a square with its diagonal, segments are isolated, padding and recomputation are free, the head works on supervised rows only, and
backward does only what autograd needs for the parts that learn. Plain arithmetic: the plan, the logged MFU and `plan=true` share it.

Source: the counts of `torch.utils.flop_counter`, which the tests hold them against to the last operation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields

from infimed.contracts import COMPONENTS, Batch, UserError

PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0}
"""Dense bf16 TFLOP/s by a part of the device's name, the first match wins. Datasheet figures: nobody reaches them."""

_SIZES = {  # transformers' name of a size -> ours
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "intermediate_size": "intermediate",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab",
}
_VISION_KEYS = ("patch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True, kw_only=True)
class VisionShape:
    """A bidirectional tower with biases everywhere and no norm or head after its blocks."""

    layers: int  # blocks that are run: 26 of SigLIP's 27 for feature layer -2
    width: int
    intermediate: int
    heads: int
    patch_dim: int  # numbers in a patch: 3 * side ** 2
    positions: int  # rows of the position table

    @property
    def block_products(self) -> int:
        """Multiply-adds of a patch in the matrices of one block."""
        return 4 * self.width**2 + 2 * self.width * self.intermediate

    @property
    def block_parameters(self) -> int:
        """Parameters of one block: the matrices, their biases, two layer norms."""
        return self.block_products + 9 * self.width + self.intermediate

    @property
    def parameters(self) -> int:
        """Parameters of patch embedding, position table and blocks."""
        return self.layers * self.block_parameters + (self.patch_dim + 1 + self.positions) * self.width


@dataclass(frozen=True, kw_only=True)
class ProjectorShape:
    """Any projector, by what one visual token costs."""

    first: int  # multiply-adds of the layers that read the tower's features: their input needs a gradient only if the tower learns
    rest: int  # multiply-adds of the layers above
    parameters: int
    saved: int  # numbers kept for backward

    @classmethod
    def mlp(cls, *, inputs: int, hidden: int, outputs: int, pre_norm: bool = False) -> ProjectorShape:
        """Describe [LayerNorm] - Linear - GELU - Linear; `inputs` is the tower's width times the patches laid side by side."""
        first, rest = inputs * hidden, hidden * outputs
        parameters, saved = first + hidden + rest + outputs, inputs + 2 * hidden
        if pre_norm:  # a norm that learns below the first layer: that layer's input needs a gradient whatever the tower does
            return cls(first=0, rest=first + rest, parameters=parameters + 2 * inputs, saved=saved + inputs)
        return cls(first=first, rest=rest, parameters=parameters, saved=saved)


@dataclass(frozen=True, kw_only=True)
class LanguageShape:
    """A Qwen3 decoder: grouped-query attention with query and key norms, gated MLP, no biases, embeddings tied to the head."""

    layers: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def block_products(self) -> int:
        """Multiply-adds of a token in the matrices of one block."""
        return self.width * (2 * self.heads + 2 * self.kv_heads) * self.head_dim + 3 * self.width * self.intermediate

    @property
    def block_parameters(self) -> int:
        """Parameters of one block: the matrices and four norms."""
        return self.block_products + 2 * self.width + 2 * self.head_dim

    @property
    def head_products(self) -> int:
        """Multiply-adds of a supervised row in the head."""
        return self.width * self.vocab

    @property
    def parameters(self) -> int:
        """Parameters, the tied table once."""
        return self.layers * self.block_parameters + self.head_products + self.width


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The three parts."""

    vision: VisionShape
    projector: ProjectorShape
    language: LanguageShape

    @property
    def parameters(self) -> int:
        """Parameters of all three."""
        return self.vision.parameters + self.projector.parameters + self.language.parameters


@dataclass(frozen=True, kw_only=True)
class Work:
    """What any number of rows ask for, as sums: the work of two rows is the sum of both."""

    tokens: int = 0  # padding left out
    pairs: int = 0  # token pairs that attend: l * (l + 1) / 2 a segment
    images: int = 0
    patches: int = 0
    patch_pairs: int = 0  # n ** 2 an image
    visual_tokens: int = 0  # rows of the projector
    supervised: int = 0  # rows of the head

    @classmethod
    def of(cls, *, documents: Sequence[int], images: Sequence[int] = (), visual_tokens: int = 0, supervised: int = 0) -> Work:
        """Add up one row.

        Args:
            documents: tokens of each isolated segment, without the padding.
            images: patches of each image.
            visual_tokens: those of `documents` that are images.
            supervised: those of `documents` that are predicted.

        Raises:
            UserError: lengths below 1, more tokens of a kind than there are tokens, visual tokens without images or the reverse.
        """
        tokens = sum(documents)
        lengths = {"documents": min(documents, default=1), "images": min(images, default=1)}
        problems = [f"{name} holds {least}, expected lengths of at least 1" for name, least in lengths.items() if least < 1]
        for name, count in (("visual_tokens", visual_tokens), ("supervised", supervised)):
            if not 0 <= count <= tokens:
                problems.append(f"{name} is {count}, expected 0 to {tokens}, the tokens of the documents")
        if bool(images) != bool(visual_tokens):
            problems.append(f"{len(images)} images give {visual_tokens} visual tokens: give both or neither")
        if problems:
            raise UserError("work: " + "; ".join(problems))
        return cls(
            tokens=tokens,
            pairs=sum(length * (length + 1) // 2 for length in documents),
            images=len(images),
            patches=sum(images),
            patch_pairs=sum(n * n for n in images),
            visual_tokens=visual_tokens,
            supervised=supervised,
        )

    @classmethod
    def of_batch(cls, batch: Batch) -> Work:
        """Add up a batch, from what it knows without asking a device."""
        images = [rows * columns for rows, columns in batch.images.grids]
        return cls.of(documents=batch.lengths, images=images, visual_tokens=batch.visual_tokens, supervised=batch.supervised_tokens)

    def __add__(self, other: Work) -> Work:
        """Add what other rows ask for."""
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True)
class Pass:
    """Operations of one part."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        """Both directions."""
        return self.forward + self.backward

    def __add__(self, other: Pass) -> Pass:
        """Add another part or other rows."""
        return Pass(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations by part."""

    vision_products: Pass
    vision_attention: Pass
    projector: Pass
    language_products: Pass
    language_attention: Pass
    head: Pass

    @property
    def vision(self) -> Pass:
        """The tower."""
        return self.vision_products + self.vision_attention

    @property
    def language(self) -> Pass:
        """The decoder without its head."""
        return self.language_products + self.language_attention

    @property
    def total(self) -> int:
        """The whole model, both directions."""
        return self.vision.total + self.projector.total + self.language.total + self.head.total


def flops(shape: ModelShape, work: Work, *, trained: Collection[str]) -> Flops:
    """Count the operations of one optimizer step's, or any other, work.

    Args:
        trained: the components that learn, of `vision`, `projector`, `language`; none for evaluation.

    Raises:
        UserError: an unknown component.
    """
    check_components(trained)
    vision, projector, language = (name in trained for name in COMPONENTS)
    any_learns = bool(trained)  # a trained decoder wants a gradient at its input too: the embedding table is a parameter of its own
    tower, reader = shape.vision, shape.language
    embed = 2 * tower.width * tower.patch_dim * work.patches
    return Flops(
        # Nothing is below the patch embedding, so pixels need no gradient.
        vision_products=_product(embed, weight=vision, data=False)
        + _product(2 * tower.layers * tower.block_products * work.patches, weight=vision, data=vision),
        vision_attention=_attention(4 * tower.layers * tower.width * work.patch_pairs, learns=vision),
        projector=_product(2 * shape.projector.first * work.visual_tokens, weight=projector, data=vision)
        + _product(2 * shape.projector.rest * work.visual_tokens, weight=projector, data=vision or projector),
        language_products=_product(2 * reader.layers * reader.block_products * work.tokens, weight=language, data=any_learns),
        language_attention=_attention(4 * reader.layers * reader.heads * reader.head_dim * work.pairs, learns=any_learns),
        head=_product(2 * reader.head_products * work.supervised, weight=language, data=any_learns),
    )


def prices(shape: ModelShape, *, trained: Collection[str]) -> dict[str, float]:
    """Return what a row's cost is made of, for dealing rows to ranks: operations by token, length ** 2, patch and patches ** 2 of an image.

    The head and the projector are left out: what is supervised is not known from metadata, and visual tokens are tokens.
    """
    one = {name: float(flops(shape, Work(**{name: 1}), trained=trained).total) for name in ("tokens", "pairs", "patches", "patch_pairs")}
    # l * (l + 1) / 2 pairs a segment: half a pair by l ** 2 and half by l
    return {"token": one["tokens"] + one["pairs"] / 2, "pair": one["pairs"] / 2, "patch": one["patches"], "patch_pair": one["patch_pairs"]}


def six_nd(shape: ModelShape, work: Work) -> int:
    """Return the usual rule of thumb, 6 x parameters x tokens: 0.75 to 1.64 times the truth over the stages in the tests."""
    return 6 * shape.parameters * work.tokens


def peak_tflops(device: str) -> float | None:
    """Return the dense bf16 TFLOP/s of a device by the name that CUDA gives it; None if unknown or a slice of one."""
    if "MIG" in device:
        return None
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in device), None)


def mfu(operations: int, *, seconds: float, peak_tflops: float) -> float:
    """Return the share of the peak that `operations` in `seconds` of one device are, 0 to 1."""
    return operations / (seconds * peak_tflops * 1e12)


def describe(name: str, shape: ModelShape, work: Work, *, trained: Collection[str]) -> str:
    """Lay out what a stage costs in six lines, in TFLOP, or in GFLOP where that is little.

    Args:
        name: what `work` is, such as `pretrain, a row`.
    """
    cost = flops(shape, work, trained=trained)
    total = max(cost.total, 1)
    unit, scale = ("TFLOP", 1e12) if total >= 1e11 else ("GFLOP", 1e9)
    image = f"   {cost.vision.total / work.images / scale:.3f} an image" if work.images else ""
    learning = ", ".join(part for part in COMPONENTS if part in trained) or "nothing"
    parts = {"vision": cost.vision, "projector": cost.projector, "language": cost.language, "head": cost.head}
    return "\n".join(
        [
            f"{name}: {work.tokens:,} tokens, {work.images:,} images, {work.supervised:,} supervised; "
            f"{cost.total / scale:.2f} {unit} (6ND: x{six_nd(shape, work) / total:.2f})",
            f"  {unit:<10}{'forward':>9}{'backward':>10}{'share':>7}   learning: {learning}",
            *(
                f"  {part:<10}{one.forward / scale:>9.3f}{one.backward / scale:>10.3f}{one.total / total:>7.0%}{image * (part == 'vision')}"
                for part, one in parts.items()
            ),
        ]
    )


def shape_of(model: Mapping[str, Mapping[str, int]]) -> ModelShape:
    """Read the shapes off the `model` section of a run, resolved to plain numbers.

    Raises:
        UserError: a key is missing, or the projector is not an MLP: give such a one's `ProjectorShape` by hand.
    """
    keys = zip(COMPONENTS, (_VISION_KEYS, ("in_features", "out_features"), tuple(_SIZES)), strict=True)
    missing = [f"model.{part}.{key}" for part, wanted in keys for key in wanted if key not in model.get(part, {})]
    if missing:
        raise UserError(f"{', '.join(missing)} not given: the cost of a model follows from its sizes")
    vision, projector, language = (model[part] for part in COMPONENTS)
    if not str(projector.get("_target_", "MLP")).endswith("MLP"):
        raise UserError(f"model.projector is {projector.get('_target_')}, not an MLP: build its flops.ProjectorShape by hand")
    return ModelShape(
        vision=VisionShape(
            layers=vision["num_hidden_layers"] + vision.get("feature_layer", -1 if "num_patches" in vision else -2) + 1,
            patch_dim=3 * vision["patch_size"] ** 2,
            positions=vision.get("num_patches") or (vision["image_size"] // vision["patch_size"]) ** 2,
            width=vision["hidden_size"],
            intermediate=vision["intermediate_size"],
            heads=vision["num_attention_heads"],
        ),
        projector=ProjectorShape.mlp(
            inputs=projector["in_features"] * projector.get("factor", 1) ** 2,
            hidden=projector.get("hidden_features") or projector["out_features"],
            outputs=projector["out_features"],
            pre_norm=bool(projector.get("pre_norm", False)),
        ),
        language=LanguageShape(**{name: language[key] for key, name in _SIZES.items()}),
    )


def check_components(trained: Collection[str]) -> None:
    """Raise a UserError for a name that is no component of the model."""
    unknown = sorted(set(trained) - set(COMPONENTS))
    if isinstance(trained, str) or unknown:
        raise UserError(f"trained is {trained!r}: expected a list of {', '.join(COMPONENTS)}")


def _product(forward: int, *, weight: bool, data: bool) -> Pass:
    """Count a matrix product: backward repeats it once for the weight's gradient and once for the input's, where wanted."""
    return Pass(forward, forward * (weight + data))


def _attention(forward: int, *, learns: bool) -> Pass:
    """Count attention: each of its two products has two inputs, so backward is twice forward."""
    return Pass(forward, 2 * forward * learns)

"""The model as an attack sees it: a fast copy to search with, and the original to judge by.

The search copy has its BatchNorm folded into the convolutions, its weights frozen, its memory laid out channels-last
and, where the hardware multiplies bfloat16 natively, its arithmetic in bfloat16. What it finds counts only after the
original has confirmed it in float32. The original is never touched: not its mode, buffers, gradients or
``requires_grad``.
"""

import copy
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, fx, nn

from redan.attacks.objectives import Objective, misclassified
from redan.errors import UserError, unknown
from redan.models.norms import Normalise

NO_GRADIENT = "the model's logits do not depend on the images by any gradient, so this cannot attack it"

Precision = Literal["auto", "float32", "bfloat16"]
Mode = Literal["eval", "train"]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 (CUDA since Ampere; x86 with AMX or AVX512-BF16)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Without a public question for it, torch's own private one; a build that lacks it gets float32.
    asks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return device.type == "cpu" and any(ask() for ask in asks if ask is not None)


class SearchModel:
    """A model prepared for attacks; every attack takes it in place of the model.

    Preparing costs a few passes of eight images, so prepare once where a model is attacked batch by batch, and call
    ``refresh`` when its weights have changed.

    Args:
        model: any module from images ``(n, c, h, w)`` in [0, 1] to logits ``(n, classes)``, in any mode.
        precision: of the search; ``auto`` is bfloat16 where the device has it natively and the model bears it.
        mode: of BatchNorm and dropout during the search. ``train`` uses the statistics of the batch; the original's
            buffers stay as they are all the same, unless ``moves_statistics``.
        moves_statistics: in mode ``train`` each pass moves the original's running statistics, too, as it does in
            public training codes that attack the network itself.
        draws: of a model that draws at random: gradients are means over so many passes (expectation over
            transformation, Athalye et al., ICML 2018), and so many judge each candidate. At least 1.
        compile: compile the search copy: a minute at the start, for runs that are long enough to earn it.

    Attributes:
        precision: as asked for.
        heartbeat: called with the images of each forward pass, three times as many where a gradient follows.

    Raises:
        UserError: for an unknown precision or mode; on use, for a model that cannot be attacked by its gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        precision: Precision = "auto",
        mode: Mode = "eval",
        moves_statistics: bool = False,
        draws: int = 1,
        compile: bool = False,
    ) -> None:
        if precision not in get_args(Precision):
            raise unknown("precision", precision, get_args(Precision))
        if mode not in get_args(Mode):
            raise unknown("attack mode", mode, get_args(Mode))
        if draws < 1:
            raise UserError(f"a model is asked at least once, got {draws} draws")
        self.draws = draws
        self.heartbeat: Callable[[int], None] = lambda images: None
        self._original = model
        self._judge: nn.Module | None = None
        self.precision = precision
        self._mode = mode
        self._moves_statistics = moves_statistics
        self._compile = compile
        self._copy: _FoldedCopy | _FoldedParts | None = None
        self._forward: Any = None
        self._classes: int | None = None
        self._precise: SearchModel | None = None

    @property
    def _exact(self) -> nn.Module:
        """The original in evaluation mode, asked anew at each use: the model's owner may switch its mode any time."""
        if not any(module.training for module in self._original.modules()):
            return self._original
        if self._judge is None:  # made on first use, when the model has come to its device
            self._judge = _twin(self._original, training=False, own_buffers=False)
        return self._judge

    @property
    def device(self) -> torch.device:
        """Where the model is; the CPU for a model without parameters and buffers."""
        return next(_tensors(self._original), torch.empty(0)).device

    @property
    def precise(self) -> "SearchModel":
        """The same search in float32: for attacks that measure how near the boundary is, which bfloat16 moves."""
        if self.precision == "float32":
            return self
        if self._precise is None:
            self._precise = SearchModel(self._original, precision="float32", mode=self._mode, draws=self.draws)
            self._precise.heartbeat = lambda images: self.heartbeat(images)
        return self._precise

    def classes(self, images: Tensor) -> int:
        """How many logits the model gives for such images; one pass of one image, once."""
        if self._classes is None:
            logits = self.exact_logits(images[:1])
            if logits.dim() != 2:
                raise UserError(f"the model gives an output of shape {tuple(logits.shape)}, not logits (n, classes)")
            self._classes = logits.shape[1]
        return self._classes

    def refresh(self) -> None:
        """Take over the present weights and statistics of the original."""
        if self._copy is not None:
            self._copy.refresh()
        if self._precise is not None:
            self._precise.refresh()

    def logits(self, images: Tensor) -> Tensor:
        """Logits of the search copy, float32 ``(n, classes)``, the mean of the draws."""
        self.heartbeat(self.draws * len(images))
        (logits,) = self._mean(lambda: (self._logits(images),))
        return logits

    @torch.no_grad()
    def values(self, images: Tensor, objective: Objective, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(n, classes)`` and objective ``(n,)``, each the mean of the draws: ``gradient`` without a gradient.

        The mean objective is not that of the mean logits, in which what one draw gets wrong another may make good.
        """
        self.heartbeat(self.draws * len(images))

        def once() -> tuple[Tensor, Tensor]:
            logits = self._logits(images)
            return logits, objective(logits, reference)

        logits, values = self._mean(once)
        return logits, values

    def gradient(self, images: Tensor, objective: Objective, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``(n, classes)``, objective ``(n,)`` and its gradient with respect to the images ``(n, c, h, w)``.

        All three are the means of the draws.
        """

        def value(logits: Tensor) -> Tensor:
            return objective(logits, reference.clone())  # what a caller made in inference mode allows no backward pass

        logits, values, gradient = self._mean(lambda: self._gradient(images, value))
        return logits, values, gradient

    def _mean(self, once: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What one draw gives, averaged over the draws."""
        total = once()
        for _ in range(self.draws - 1):
            total = tuple(a + b for a, b in zip(total, once(), strict=True))
        return tuple(it / self.draws for it in total)

    def _gradient(self, images: Tensor, value: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """One draw of the logits, their values and the gradient."""
        self.heartbeat(3 * len(images))
        logits, values, gradient = _differentiate(self._logits, images, value)
        if gradient is None:
            raise UserError(NO_GRADIENT)
        # One infinite slope in the model must not turn the whole image into NaN.
        return logits, values, gradient.nan_to_num()

    def _logits(self, images: Tensor) -> Tensor:
        """One draw of the search copy's logits."""
        if self._forward is None:
            with torch.inference_mode(False):  # what is made there could not be differentiated later
                self._prepare(images)
        images = images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images
        # A folded copy is in bfloat16 itself; batch statistics cannot be folded, so there autocast has to do.
        rounds = self._mode == "train" and self._wants_bfloat16(images.device)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=rounds):
            logits: Tensor = self._forward(images)
        return logits.float()

    @torch.no_grad()
    def exact_logits(self, images: Tensor) -> Tensor:
        """One draw of the original's logits in float32 and evaluation mode, ``(n, classes)``."""
        self.heartbeat(len(images))
        with torch.autocast(images.device.type, enabled=False), _no_tf32(images.device):
            logits: Tensor = self._exact(images)
        return logits.float()

    def score(self, images: Tensor, labels: Tensor) -> Tensor:
        """Share of the draws in which the original misclassifies each image in float32 and evaluation mode: ``(n,)``.

        Without randomness that is 1 for a broken image and 0 for any other.
        """
        wrong = [misclassified(self.exact_logits(images), labels) for _ in range(self.draws)]
        return torch.stack(wrong).float().mean(0)

    def _evaluated(self, images: Tensor) -> Tensor:
        """The original in evaluation mode, searched as it is."""
        logits: Tensor = self._exact(images)
        return logits

    def broken(self, images: Tensor, labels: Tensor) -> Tensor:
        """Which images the original misclassifies in float32 and evaluation mode, in every draw: bool ``(n,)``."""
        return self.score(images, labels) == 1

    def _wants_bfloat16(self, device: torch.device) -> bool:
        return self.precision == "bfloat16" or (self.precision == "auto" and has_fast_bfloat16(device))

    def _prepare(self, images: Tensor) -> None:
        """Choose the fastest copy that computes what the original computes."""
        if self._mode == "train":
            twin = _twin(self._original, training=True, own_buffers=not self._moves_statistics)
            self._forward = torch.compile(twin) if self._compile else twin
            return
        self._forward = self._evaluated
        exact, sample = self._exact, images[:8].detach()
        parts = getattr(exact, "deterministic_parts", ())
        if self.draws > 1 and not parts:  # a trace could keep one draw for ever, and no comparison would tell
            return

        def copied(dtype: torch.dtype) -> "_FoldedCopy | _FoldedParts | None":
            return _FoldedParts.of(exact, parts, dtype) if parts else _FoldedCopy.of(exact, dtype)

        folded = copied(torch.float32)
        if folded is None or not _is_faithful(folded.module, exact, sample, draws=bool(parts)):
            return
        with torch.no_grad():
            with _one_draw(sample.device):
                logits = self.exact_logits(sample)
            reduced = copied(torch.bfloat16) if self._wants_bfloat16(sample.device) else None
            if reduced is not None and (rounded := _attempt(reduced.module, sample)) is not None:
                # Where nobody asked for it, bfloat16 must also come close: a model can be too steep for it.
                folded = reduced if self.precision == "bfloat16" or _agree(rounded, logits, 0.1) else folded
        self._copy = folded
        self._forward = folded.compiled() if self._compile else folded.module


def _no_tf32(device: torch.device) -> AbstractContextManager[None]:
    """CUDA's convolutions round float32 to 19 bits unless told not to."""
    if device.type != "cuda":
        return nullcontext()
    cudnn = torch.backends.cudnn
    return cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False)


def _differentiate(
    forward: Callable[[Tensor], Tensor], images: Tensor, value: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, ``value(logits)`` and the gradient of its sum in the images; None where there is no path back to them.

    Whatever mode the caller is in: inference mode forbids gradients, autocast would round the backward pass.
    """
    no_autocast = torch.autocast(images.device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), no_autocast:
        leaf = images.detach().clone().requires_grad_()
        logits = forward(leaf)
        values = value(logits)
        gradient = torch.autograd.grad(values.sum(), leaf, allow_unused=True)[0] if values.requires_grad else None
    return logits.detach(), values.detach(), gradient


def _is_faithful(
    traced: Callable[[Tensor], Tensor], original: Callable[[Tensor], Tensor], images: Tensor, *, draws: bool
) -> bool:
    """Whether a trace gives the original's logits and gradients.

    It does not where tracing froze a random draw, or lost a gradient that the model defines by itself
    (``torch.autograd.Function``, as straight-through estimators have it) for that of the bare forward pass. A model
    that ``draws`` where it was not traced does so from torch alone, and its trace takes as much.
    """

    def weighted(logits: Tensor) -> Tensor:
        return (logits.float() * torch.linspace(-1, 1, logits.shape[1], device=logits.device)).sum(1)

    def on_one_draw(forward: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None, list[bytes]]:
        """Logits, gradient, and the state of all randomness before and after them."""
        with _one_draw(images.device):
            before = _random_state(images.device)
            logits, _, gradient = _differentiate(forward, images, weighted)
            return logits, gradient, [before, _random_state(images.device)]

    outside = _random_state(images.device)
    exact, exact_gradient, states = on_one_draw(original)
    if _random_state(images.device) != outside or not (draws or states[0] == states[1]):
        return False
    logits, gradient, theirs = on_one_draw(traced)
    if gradient is None or exact_gradient is None or theirs != states:
        return False
    error = (gradient - exact_gradient).flatten(1).norm(dim=1)
    return _agree(logits, exact, 1e-3) and bool((error <= 0.05 * exact_gradient.flatten(1).norm(dim=1)).all())


def _random_state(device: torch.device) -> bytes:
    """Of all common sources that a model may draw from."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return pickle.dumps((random.getstate(), np.random.get_state(), [state.numpy() for state in states]))


@contextmanager
def _one_draw(device: torch.device) -> Iterator[None]:
    """The same torch randomness inside each such block, and none taken from the caller's."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def _agree(logits: Tensor, exact: Tensor, tolerance: float) -> bool:
    """Whether logits differ from the exact ones by no more than this share of the logits' spread."""
    spread = (exact - exact.mean(1, keepdim=True)).abs().amax().clamp(min=1e-6)
    return bool(((logits.float() - exact).abs() <= tolerance * spread).all())


def _attempt(forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor | None:
    """Logits on one draw, or None where there are none (a model mixes in tensors of its own that stayed float32)."""
    try:
        with _one_draw(images.device):
            logits = forward(images)
    except RuntimeError:
        return None
    return logits


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _twin(model: nn.Module, *, training: bool, own_buffers: bool) -> nn.Module:
    """A second module over the same parameters, in the given mode; over the same buffers unless it has its own."""
    shared = list(model.parameters()) if own_buffers else list(_tensors(model))
    try:
        twin = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    except (TypeError, RuntimeError) as error:
        raise UserError(
            f"{type(model).__name__} cannot be copied for the attack ({error}); put it in evaluation mode with .eval()"
        ) from error
    return twin.train(training)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (Normalise, nn.Conv2d)) or super().is_leaf_module(m, module_qualified_name)


class _FoldedCopy:
    """A copy of a module in evaluation mode with every BatchNorm folded, and the way to bring it up to date."""

    def __init__(self, original: nn.Module, dtype: torch.dtype) -> None:
        clone = copy.deepcopy(original).requires_grad_(False)
        graph = _Tracer().trace(clone)
        self.module = fx.GraphModule(clone, graph)
        # Which layers of the original make which layer of the copy.
        self._convolutions: list[tuple[nn.Conv2d, nn.Conv2d, nn.BatchNorm2d]] = []
        originals = dict(original.named_modules())
        used = [node.target for node in graph.nodes if node.op == "call_module"]
        for node in list(graph.nodes):
            batch_norm = originals.get(node.target) if node.op == "call_module" else None
            if not isinstance(batch_norm, nn.BatchNorm2d) or batch_norm.running_mean is None:
                continue
            source = node.args[0]
            convolution = originals.get(source.target) if source.op == "call_module" else None
            if isinstance(convolution, nn.Conv2d) and len(source.users) == 1 and used.count(source.target) == 1:
                folded = self.module.get_submodule(source.target)
                assert isinstance(folded, nn.Conv2d)
                if folded.bias is None:
                    folded.bias = nn.Parameter(folded.weight.new_zeros(folded.out_channels), requires_grad=False)
                self._convolutions.append((folded, convolution, batch_norm))
                node.replace_all_uses_with(source)
                graph.erase_node(node)
        keeps_float32: list[nn.Module] = []
        if dtype != torch.float32:
            self._cast_after_normalisation(graph, dtype)
            keeps_float32 = self._cast_before_head(graph)
        self.module.delete_all_unused_submodules()
        self.module.recompile()
        self.module.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for module in self.module.modules():
            if isinstance(module, (Normalise, nn.BatchNorm2d)) or module in keeps_float32:
                module.float()  # few numbers: precision is free
        covered = {id(folded) for folded, _, _ in self._convolutions}
        self._plain = [
            (mine, theirs)
            for name, module in self.module.named_modules()
            if id(module) not in covered and name in originals
            for mine, theirs in _own_tensors(module, originals[name])
        ]
        self.refresh()

    @classmethod
    def of(cls, original: nn.Module, dtype: torch.dtype = torch.float32) -> "_FoldedCopy | None":
        """The folded copy, or None where the module's forward cannot be traced or copied."""
        try:
            return cls(original, dtype)
        except Exception:
            return None

    def compiled(self) -> Any:
        """The copy, compiled."""
        return torch.compile(self.module)

    def _cast_after_normalisation(self, graph: fx.Graph, dtype: torch.dtype) -> None:
        """Pixels keep float32 until they are normalised: bfloat16 is coarser than a grey level near 1."""
        for node in [node for node in graph.nodes if node.op == "placeholder"]:
            users = list(node.users)
            first = users[0] if len(users) == 1 and users[0].op == "call_module" else None
            if first is not None and isinstance(self.module.get_submodule(first.target), Normalise):
                node = first
            with graph.inserting_after(node):
                cast = graph.call_method("to", (node, dtype))
            node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)

    def _cast_before_head(self, graph: fx.Graph) -> list[nn.Module]:
        """A last linear layer computes in float32: rounded logits hide small gains from who compares objectives.

        Returns the layer, if there is one.
        """
        output = next(node for node in graph.nodes if node.op == "output")
        head = output.args[0]
        assert isinstance(head, fx.Node)
        layer = self.module.get_submodule(str(head.target)) if head.op == "call_module" else None
        if not isinstance(layer, nn.Linear):
            return []
        with graph.inserting_before(head):
            cast = graph.call_method("to", (head.args[0], torch.float32))
        head.update_arg(0, cast)
        return [layer]

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the folded weights anew, in float32, and copy all others."""
        for folded, convolution, batch_norm in self._convolutions:
            scale, shift = _scale_and_shift(batch_norm)
            folded.weight.copy_(convolution.weight * scale[:, None, None, None])
            assert folded.bias is not None
            folded.bias.copy_(shift if convolution.bias is None else shift + convolution.bias * scale)
        for mine, theirs in self._plain:
            mine.copy_(theirs)


class _FoldedParts:
    """A model whose named children are folded copies; its own code stays, with all that it draws."""

    def __init__(self, original: nn.Module, parts: Sequence[str], dtype: torch.dtype) -> None:
        # What is not folded stays in evaluation mode, too, whatever becomes of the original's.
        self.module = _twin(original, training=False, own_buffers=False)
        self._copies: dict[str, _FoldedCopy] = {}
        for part in parts:
            folded = _FoldedCopy.of(original.get_submodule(part), dtype)
            if folded is not None:
                setattr(self.module, part, folded.module)
                self._copies[part] = folded

    @classmethod
    def of(cls, original: nn.Module, parts: Sequence[str], dtype: torch.dtype) -> "_FoldedParts | None":
        """The model with folded parts, or None where it cannot be copied."""
        try:
            return cls(original, parts, dtype)
        except UserError:
            return None

    def compiled(self) -> nn.Module:
        """The model with its folded parts compiled; what draws stays as it is: compiled draws are other ones."""
        for part, folded in self._copies.items():
            setattr(self.module, part, torch.compile(folded.module))
        return self.module

    def refresh(self) -> None:
        """Bring every copy up to date."""
        for folded in self._copies.values():
            folded.refresh()


def _scale_and_shift(batch_norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """BatchNorm with fixed statistics as ``x * scale + shift``."""
    assert batch_norm.running_mean is not None and batch_norm.running_var is not None
    scale = (batch_norm.running_var + batch_norm.eps).rsqrt()
    if batch_norm.affine:
        scale = scale * batch_norm.weight
    shift = -batch_norm.running_mean * scale
    return scale, shift + batch_norm.bias if batch_norm.affine else shift


def _own_tensors(mine: nn.Module, theirs: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of the tensors that two like modules hold themselves, without their children's."""
    for own in ("_parameters", "_buffers"):
        for name, tensor in getattr(theirs, own).items():
            if tensor is not None and name in getattr(mine, own):
                yield getattr(mine, own)[name], tensor

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf.functional.logprobs import token_logprobs

N, D, V = 37, 8, 23


def problem(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=bias, dtype=dtype)
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    return hidden, torch.randint(V, (N,)), head


def plain(hidden, targets, head, temperature):
    """Compute the definition: log-softmax over all logits at once."""
    log_probabilities = torch.log_softmax(head(hidden).float() / temperature, -1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


HEADS = {"linear": lambda head: head, "callable": lambda head: lambda x: head(x)}


@pytest.mark.parametrize("chunk_elements", [1, 5 * V, None])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("temperature, bias", [(1.0, False), (0.7, True)])
def test_logprobs_equal_a_full_log_softmax(kind, entropy, chunk_elements, temperature, bias):
    hidden, targets, head = problem(bias=bias)
    wanted = [hidden, *head.parameters()]
    upstream = torch.randn(2, N)
    expected = plain(hidden, targets, head, temperature)
    made = token_logprobs(hidden, targets, HEADS[kind](head), temperature, chunk_elements, entropy)
    torch.testing.assert_close(made[0], expected[0], rtol=1e-6, atol=1e-6)
    loss, made_loss = (expected[0] * upstream[0]).sum(), (made[0] * upstream[0]).sum()
    if entropy:
        torch.testing.assert_close(made[1], expected[1], rtol=1e-6, atol=1e-6)
        loss, made_loss = loss + (expected[1] * upstream[1]).sum(), made_loss + (made[1] * upstream[1]).sum()
    else:
        assert made[1] is None
    for a, b in zip(torch.autograd.grad(made_loss, wanted), torch.autograd.grad(loss, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("output", [0, 1])
def test_gradient_through_a_single_output(kind, output):
    hidden, targets, head = problem()
    made = token_logprobs(hidden, targets, HEADS[kind](head), 1.3, 4 * V, entropy=True)[output]
    expected = plain(hidden, targets, head, 1.3)[output]
    wanted = [hidden, *head.parameters()]
    made_gradients, gradients = torch.autograd.grad(made.sum(), wanted), torch.autograd.grad(expected.sum(), wanted)
    for a, b in zip(made_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("upstream", ["equal", "different"])
@pytest.mark.parametrize("frozen", ["nothing", "hidden", "weight", "bias"])
@pytest.mark.parametrize("temperature, bias", [(1.0, False), (0.7, True)])
def test_a_gradient_that_is_announced_as_uniform_is_right_if_it_is_not(upstream, frozen, temperature, bias):
    hidden, targets, head = problem(bias=bias)
    leaves = {"hidden": hidden, "weight": head.weight, **({"bias": head.bias} if bias else {})}
    if frozen in leaves:
        leaves.pop(frozen).requires_grad_(False)
    pull = torch.full((N,), -0.3) if upstream == "equal" else torch.randn(N)
    made, _ = token_logprobs(hidden, targets, head, temperature, 5 * V, uniform=True)
    expected, _ = plain(hidden, targets, head, temperature)
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-6)
    wanted = list(leaves.values())
    for a, b in zip(torch.autograd.grad(made, wanted, pull), torch.autograd.grad(expected, wanted, pull), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Products(TorchDispatchMode):
    """Context manager that counts the multiplications in products of matrices; torch's counter leaves out addmm_."""

    def __init__(self):
        super().__init__()
        self.multiplications = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("uniform, products", [(True, 3), (False, 4)])
def test_a_uniform_gradient_takes_three_multiplications_with_the_output_matrix(uniform, products):
    hidden, targets, head = problem(bias=False)
    with Products() as counted:
        token_logprobs(hidden, targets, head, chunk_elements=5 * V, uniform=uniform)[0].mean().backward()
    assert counted.multiplications == products * N * D * V


@pytest.mark.parametrize("kind", HEADS)
def test_gradient_with_a_frozen_head(kind):
    hidden, targets, head = problem()
    head.requires_grad_(False)
    (made,) = torch.autograd.grad(token_logprobs(hidden, targets, HEADS[kind](head), 0.7, 3 * V)[0].sum(), hidden)
    (expected,) = torch.autograd.grad(plain(hidden, targets, head, 0.7)[0].sum(), hidden)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


def test_frozen_hidden_states_still_train_the_head():
    hidden, targets, head = problem()
    token_logprobs(hidden.detach(), targets, head, chunk_elements=3 * V)[0].sum().backward()
    (expected,) = torch.autograd.grad(plain(hidden.detach(), targets, head, 1.0)[0].sum(), head.weight)
    torch.testing.assert_close(head.weight.grad, expected, rtol=1e-5, atol=1e-5)


def test_gradient_by_finite_differences():
    torch.manual_seed(0)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 4, 2, 2])

    def loss(hidden, weight):
        logits = hidden @ weight.t()
        return token_logprobs(hidden, targets, lambda x: x @ weight.t(), 0.9, 5)[0].double().sum() + 0 * logits.sum()

    gradients = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    step = 1e-3
    for tensor, gradient in zip((hidden, weight), gradients, strict=True):
        for index in ((0, 0), (2, 1), (3, 2)):
            bump = torch.zeros_like(tensor)
            bump[index] = step
            moved = [
                loss(*(x + sign * bump if x is tensor else x for x in (hidden, weight))).item() for sign in (1, -1)
            ]
            assert gradient[index].item() == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=2e-3)


class Largest(TorchDispatchMode):
    """Context manager that records the largest number of elements of any tensor made inside."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return made


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_no_tensor_of_all_logits_is_made(kind, entropy, uniform):
    torch.manual_seed(0)
    rows, vocabulary = 400, 600
    head = nn.Linear(D, vocabulary, bias=False)
    hidden, targets = torch.randn(rows, D, requires_grad=True), torch.randint(vocabulary, (rows,))
    with Largest() as largest:
        logps, entropies = token_logprobs(hidden, targets, HEADS[kind](head), 0.9, 20 * vocabulary, entropy, uniform)
        (logps.sum() + (entropies.sum() if entropy else 0)).backward()
    assert largest.elements == 20 * vocabulary
    with Largest() as largest:
        plain(hidden, targets, head, 0.9)
    assert largest.elements == rows * vocabulary  # the recorder detects large tensors


@pytest.mark.parametrize("uniform, most", [(False, 2**21), (True, 2**19)])
def test_default_blocks_bound_large_vocabularies(uniform, most):
    """A block has 2**21 logits; a chunk of 256 rows, which a uniform gradient takes, has blocks of 2**19."""
    rows, vocabulary = 1024, 20000
    head = nn.Linear(2, vocabulary, bias=False)
    hidden = torch.randn(rows, 2, requires_grad=True)
    with Largest() as largest:
        token_logprobs(hidden, torch.zeros(rows, dtype=torch.long), head, uniform=uniform)[0].sum().backward()
    assert most * 0.99 < largest.elements <= most  # whole columns


def test_rows_do_not_depend_on_each_other():
    hidden, targets, head = problem()
    whole = token_logprobs(hidden, targets, head)[0]
    torch.testing.assert_close(token_logprobs(hidden[5:9], targets[5:9], head)[0], whole[5:9], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", HEADS)
def test_an_empty_batch_has_no_logprobs(kind):
    hidden, targets, head = problem()
    logps, entropy = token_logprobs(hidden[:0], targets[:0], HEADS[kind](head), entropy=True)
    assert logps.shape == entropy.shape == (0,)
    logps.sum().backward()
    assert hidden.grad.eq(0).all()


@pytest.mark.parametrize("kind", HEADS)
def test_logprobs_under_no_grad(kind):
    hidden, targets, head = problem()
    with torch.no_grad():
        logps, _ = token_logprobs(hidden, targets, HEADS[kind](head), chunk_elements=4 * V)
    assert not logps.requires_grad
    torch.testing.assert_close(logps, plain(hidden, targets, head, 1.0)[0].detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk_elements", [4 * V, None])
@pytest.mark.parametrize("kind", HEADS)
def test_logprobs_under_autocast_equal_a_full_log_softmax(kind, chunk_elements):
    hidden, targets, head = problem(bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = token_logprobs(hidden, targets, HEADS[kind](head), 1.0, chunk_elements)[0]
        expected = plain(hidden, targets, head, 1.0)[0]
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-6)
    made_gradients = torch.autograd.grad(made.sum(), [hidden, head.weight])
    for a, b in zip(made_gradients, torch.autograd.grad(expected.sum(), [hidden, head.weight]), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_forbidden_tokens_have_no_weight_in_the_entropy():
    """Logits 0, 0, -inf: probability 1/2 each, entropy log 2."""
    hidden = torch.zeros(1, 2, requires_grad=True)
    logits = torch.tensor([[0.0, 0.0, float("-inf")]])
    logps, entropy = token_logprobs(hidden, torch.tensor([1]), lambda x: x.sum(-1, keepdim=True) + logits, entropy=True)
    assert logps.item() == pytest.approx(-0.6931472)
    assert entropy.item() == pytest.approx(0.6931472)


@pytest.mark.parametrize("chunk_elements", [1, 4 * N, None])
@pytest.mark.parametrize("uniform", [False, True])
def test_a_bias_may_forbid_whole_blocks_of_tokens(uniform, chunk_elements):
    """Logits of -inf: probability 0, and gradients without nan."""
    hidden, targets, head = problem()
    with torch.no_grad():
        head.bias[3:17] = -torch.inf
    targets %= 3
    allowed = [*range(3), *range(17, V)]
    fewer = nn.Linear(D, len(allowed))
    fewer.weight, fewer.bias = nn.Parameter(head.weight[allowed]), nn.Parameter(head.bias[allowed])
    expected = plain(hidden, targets, fewer, 0.7)
    made = token_logprobs(hidden, targets, head, 0.7, chunk_elements, entropy=not uniform, uniform=uniform)
    torch.testing.assert_close(made[0], expected[0], rtol=1e-6, atol=1e-6)
    pull = 1.0 if uniform else torch.arange(1.0, N + 1)
    loss, plain_loss = (made[0] * pull).sum(), (expected[0] * pull).sum()
    if not uniform:
        torch.testing.assert_close(made[1], expected[1], rtol=1e-6, atol=1e-6)
        loss, plain_loss = loss + made[1].square().sum(), plain_loss + expected[1].square().sum()
    found, wanted = (
        torch.autograd.grad(one, [hidden, layer.weight]) for one, layer in ((loss, head), (plain_loss, fewer))
    )
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1][allowed], wanted[1], rtol=1e-5, atol=1e-5)
    assert found[1][3:17].eq(0).all()


def test_logits_far_from_zero_keep_their_probabilities():
    """Two logits 200 apart, in blocks of one column: log-probabilities 0 and -200, where exp(-200) is 0 in fp32."""
    hidden, head = torch.tensor([[1.0], [1.0]], requires_grad=True), nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        head.weight[:] = torch.tensor([[-100.0], [100.0]])
    logps, entropy = token_logprobs(hidden, torch.tensor([0, 1]), head, chunk_elements=2, entropy=True)
    assert logps.tolist() == [-200.0, 0.0] and entropy.tolist() == [0.0, 0.0]
    (by_hidden,) = torch.autograd.grad(logps.sum(), hidden)
    assert by_hidden[:, 0].tolist() == [-200.0, 0.0]  # w_target - sum(p w)


def test_hooked_or_wrapped_heads_are_called():
    """A head that is more than its matrix (a hook, a subclass) must run as a module."""
    hidden, targets, head = problem()
    calls = []
    head.register_forward_hook(lambda module, args, output: calls.append(1) or output * 2)
    made = token_logprobs(hidden, targets, head)[0]
    assert calls
    torch.testing.assert_close(made, plain(hidden, targets, head, 1.0)[0], rtol=1e-6, atol=1e-6)


def test_invalid_inputs_are_refused():
    hidden, targets, head = problem()
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(hidden, targets, head, temperature=0.0)
    with pytest.raises(ValueError, match=r"\[N\]"):
        token_logprobs(hidden, targets[:-1], head)

"""The exact testbed against published identities and reference values; then the table that runs as a model.

Reference values are exact enumerations in float64, given to eight digits. Try it: `pytest tests/test_exact.py`.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import log
from types import SimpleNamespace

import make
import numpy as np
import pytest
import torch
from scipy.special import expit

from preftune import exact
from preftune.exact import B4, T3, W3, Problem, TableModel
from preftune.losses import LOSSES

BETAS = (0.1, 0.5, 1.0, 2.0, 5.0)


def close(value, expected, atol=1e-8):
    np.testing.assert_allclose(np.asarray(value), np.asarray(expected), rtol=0, atol=atol)


def logits(policy: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.log(policy))


def minimiser(name: str, problem: Problem = B4, **options) -> np.ndarray:
    """The policy at the minimum of the population loss, from the reference."""
    start = logits(problem.reference)
    theta = exact.minimise(lambda t: exact.population_loss(name, t.log_softmax(-1), problem, **options), start)
    return theta.softmax(-1).numpy()


# ---- 1 and 2: optimum and frontier -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "policy", "z", "reward", "kl", "value"),
    [
        (0.1, (1e-8, 0.00013618, 6.1e-7, 0.99986320), 48523157.563, 1.99986289, 2.30107713, 1.76975517),
        (0.5, (0.04640270, 0.25715411, 0.06306781, 0.63337538), 8.62018820, 1.55543878, 0.95677064, 1.07705346),
        (1.0, (0.17512104, 0.35702126, 0.14436289, 0.32349480), 2.28413441, 1.07619231, 0.25020517, 0.82598714),
        (2.0, (0.28104697, 0.34752609, 0.18043573, 0.19099122), 1.42324965, 0.81972639, 0.05692045, 0.70588548),
        (5.0, (0.35191519, 0.32237264, 0.19446322, 0.13124894), 1.13663748, 0.68210214, 0.00834610, 0.64037163),
    ],
)
def test_b4_table(beta, policy, z, reward, kl, value):
    best = exact.optimum(B4, beta=beta)
    close(best, policy)
    assert np.exp(exact.log_partition(B4, beta=beta)) == pytest.approx(z, rel=1e-8)
    close([best @ B4.reward, exact.kl(best, B4.reference), exact.soft_value(B4, beta=beta)], [reward, kl, value])
    close(exact.objective(B4, best, beta=beta), exact.soft_value(B4, beta=beta), atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_nothing_beats_the_optimum(beta):
    """2,000 random policies, near and far: none has a larger objective, and the gap is beta KL(pi||pi*)."""
    rng, best = np.random.default_rng(0), exact.optimum(B4, beta=beta)
    for k in range(2000):
        other = rng.dirichlet(np.ones(4)) if k % 2 else best * np.exp(rng.normal(scale=0.05, size=4))
        other = other / other.sum()
        gap = exact.soft_value(B4, beta=beta) - exact.objective(B4, other, beta=beta)
        assert gap >= -1e-12
        close(gap, beta * exact.kl(other, best), atol=1e-10)


def test_frontier():
    """Along beta the slope dE[r]/dKL is beta; E[r] rises and is concave in KL; nothing lies above the curve."""
    for beta in (0.5, 1.0):
        (k0, r0), (k1, r1) = exact.frontier(B4, [beta * 1.0001, beta * 0.9999])
        assert (r1 - r0) / (k1 - k0) == pytest.approx(beta, abs=1e-6)
    curve = exact.frontier(B4, np.geomspace(50, 0.1, 300))
    slopes = np.diff(curve[:, 1]) / np.diff(curve[:, 0])
    assert (np.diff(curve, axis=0) > 0).all() and (np.diff(slopes) < 1e-9).all()
    rng = np.random.default_rng(0)
    others = [exact.best_of_n(B4, n) for n in (2, 4, 8)] + [exact.preferred_ft(B4), exact.soft_best_of_n(B4, 4, temperature=0.3)]
    others += list(rng.dirichlet(np.ones(4), size=200))
    for policy in others:
        kl, reward = exact.kl(policy, B4.reference), policy @ B4.reward
        # Every beta bounds the curve from above by its tangent: E[r] <= V(beta) + beta KL.
        assert all(reward <= exact.soft_value(B4, beta=b) + b * kl + 1e-12 for b in np.geomspace(50, 0.02, 60))


def test_small_tilt():
    """KL ~ Var_ref(r)/(2 beta^2): Var_ref = .3 + .05 + .4 - .6^2 = .39, so .00195 at beta 10 against .0020187."""
    variance = B4.reference @ B4.reward**2 - (B4.reference @ B4.reward) ** 2
    close(variance, 0.39, atol=1e-12)
    close(exact.kl(exact.optimum(B4, beta=10.0), B4.reference), 0.0020187, atol=5e-8)
    assert exact.kl(exact.optimum(B4, beta=1000.0), B4.reference) == pytest.approx(0.39 / 2e6, rel=2e-3)


def test_problem_refuses_what_is_not_a_distribution():
    for reference in ([0.5, 0.6], [1.0, 0.0], [0.5, 0.25, 0.25]):
        with pytest.raises(ValueError, match="sum to 1"):
            Problem(np.array(reference), np.array([0.0, 1.0]))


# ---- 3, 4 and 5: recovery and invariance (the gradient is in test_losses) ---------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_dpo_recovers_the_optimum(beta):
    """All pairs with Bradley-Terry labels: the minimiser is pi*, and the least loss is the labels' entropy, whatever beta.

    .27754052 averages P_ij L(i,j) over 12 ordered pairs; here the mean is over 6 pairs with both labels: twice that.
    """
    close(minimiser("sigmoid", beta=beta), exact.optimum(B4, beta=beta))
    least = exact.population_loss("sigmoid", logits(exact.optimum(B4, beta=beta)), B4, beta=beta)
    close(least / 2, 0.27754052)
    p = np.array([exact.bradley_terry(B4.reward)[i, j] for i, j in exact.all_pairs(4)])
    close(least, -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean(), atol=1e-12)


def test_robust_recovers_the_optimum_from_flipped_labels():
    """Labels flipped with e = .1 and the robust loss at e = .1: pi* again; plain DPO on the same labels is too timid."""
    flipped = [0.9 * p + 0.1 * (1 - p) for p in (exact.bradley_terry(B4.reward)[i, j] for i, j in exact.all_pairs(4))]
    close(minimiser("robust", beta=0.5, noise=0.1, prob=flipped), exact.optimum(B4, beta=0.5))
    timid = minimiser("sigmoid", beta=0.5, prob=flipped)
    assert exact.kl(timid, B4.reference) < exact.kl(exact.optimum(B4, beta=0.5), B4.reference) - 0.1


def test_unjudged_responses_keep_the_reference_ratio():
    """Only the pair (0, 3) is judged: the odds of 1 to 2 stay the reference's and pi* is not found."""
    found = minimiser("sigmoid", beta=1.0, pairs=[(3, 0)])
    close(found, (0.160125, 0.326449, 0.217633, 0.295793), atol=1e-6)
    close(found[1] / found[2], 1.5)
    assert np.abs(found - exact.optimum(B4, beta=1.0)).max() > 0.01


def test_reference_free_forgets_the_reference():
    """Its minimum is exp(r/beta)/Z: DPO's optimum had the reference been uniform."""
    uniform = Problem(np.full(4, 0.25), B4.reward)
    close(minimiser("reference-free", beta=0.5), exact.optimum(uniform, beta=0.5))


def test_ipo_closed_form():
    """All pairs equally: pi = ref e^h / Z with h_i = mean_j (2 P_ij - 1)/(2 tau). B4, tau .5. It is bounded."""
    h = (2 * exact.bradley_terry(B4.reward) - 1).mean(1) / (2 * 0.5)
    expected = B4.reference * np.exp(h) / (B4.reference @ np.exp(h))
    close(minimiser("ipo-sum", tau=0.5), expected)
    close(expected, (0.29928256, 0.34449971, 0.18430854, 0.17190919))
    two = Problem(np.array([0.5, 0.5]), np.zeros(2))
    found = [minimiser("ipo-sum", two, tau=t, prob=[1.0])[0] for t in (0.1, 0.5, 1.0, 5.0)]
    close(found, expit([5, 1, 0.5, 0.1]))  # sigmoid(1/(2 tau)): larger tau is always closer to the reference


def test_length_normalisation_has_another_optimum():
    """`sigmoid-norm` ends where beta (a_w/n_w - a_l/n_l) = r_w - r_l, which is pi* for no beta once lengths differ."""
    lengths = np.array([1, 2, 3, 5])
    found = minimiser("sigmoid-norm", beta=2.0, lengths=lengths.tolist())
    mean = np.log(found / B4.reference) / lengths
    close(2.0 * (mean - mean[0]), B4.reward - B4.reward[0])
    gaps = [np.abs(found - exact.optimum(B4, beta=b)).max() for b in np.geomspace(0.01, 100, 400)]
    assert min(gaps) > 0.01


@pytest.mark.parametrize("pairs", [[(0, 1), (1, 2), (2, 3)], [(0, 3), (3, 1), (1, 2)]])
def test_a_connected_chain_of_pairs_is_enough(pairs):
    close(minimiser("sigmoid", beta=1.0, pairs=pairs), exact.optimum(B4, beta=1.0))


def test_only_reward_differences_matter():
    """r -> r + f(x) changes no label, loss, gradient, pi* or KL; log Z moves by f/beta. Other changes of r move pi*."""
    moved = replace(B4, reward=B4.reward + 3.25)
    close(exact.bradley_terry(moved.reward), exact.bradley_terry(B4.reward), atol=1e-12)
    theta = torch.tensor([0.1, -0.4, 0.3, 0.0], dtype=torch.float64, requires_grad=True)
    losses = [exact.population_loss("sigmoid", theta.log_softmax(-1), p) for p in (B4, moved)]
    gradients = [torch.autograd.grad(loss, theta)[0] for loss in losses]
    close(losses[0].detach(), losses[1].detach(), atol=1e-12)
    close(*gradients, atol=1e-12)
    for beta in BETAS:
        close(exact.optimum(moved, beta=beta), exact.optimum(B4, beta=beta), atol=1e-12)
        close(exact.log_partition(moved, beta=beta) - exact.log_partition(B4, beta=beta), 3.25 / beta, atol=1e-9)
        implied = beta * np.log(exact.optimum(B4, beta=beta) / B4.reference)
        close(implied + exact.soft_value(B4, beta=beta), B4.reward, atol=1e-6 if beta == 0.1 else 1e-10)
    bent = replace(B4, reward=B4.reward + np.array([0, 0, 0, 0.01]))
    assert np.abs(exact.optimum(bent, beta=1.0) - exact.optimum(B4, beta=1.0)).max() > 1e-3


def test_only_the_ratio_of_reward_to_beta_matters():
    close(exact.optimum(replace(B4, reward=3 * B4.reward), beta=1.5), exact.optimum(B4, beta=0.5), atol=1e-12)


# ---- 6: Bradley-Terry and Plackett-Luce ------------------------------------------------------------------------------------


def test_bradley_terry():
    """P_ij + P_ji = 1; unchanged by a shift; strongly transitive: P_ij, P_jk >= 1/2 give P_ik >= both; odds multiply."""
    for strength in (B4.reward, np.random.default_rng(0).normal(scale=2, size=7)):
        p, n = exact.bradley_terry(strength), len(strength)
        close(p + p.T, np.ones((n, n)), atol=1e-12)
        close(exact.bradley_terry(strength + 5), p, atol=1e-12)
        swept = 0
        for i, j, k in itertools.permutations(range(n), 3):
            if p[i, j] >= 0.5 and p[j, k] >= 0.5:
                swept += 1
                assert p[i, k] >= max(p[i, j], p[j, k])
                close(p[i, k] / p[k, i], (p[i, j] / p[j, i]) * (p[j, k] / p[k, j]), atol=1e-6 * p[i, k] / p[k, i])
        assert swept == n * (n - 1) * (n - 2) // 6


def test_plackett_luce():
    """24 orders sum to 1; two items are Bradley-Terry exactly; any pair's marginal is Bradley-Terry; (3,1,2,0) has .18261904."""
    orders = list(itertools.permutations(range(4)))
    probability = {o: exact.plackett_luce(B4.reward, o) for o in orders}
    close(sum(probability.values()), 1, atol=1e-12)
    close(probability[3, 1, 2, 0], 0.18261904)
    p = exact.bradley_terry(B4.reward)
    for i, j in itertools.permutations(range(4), 2):
        close(exact.plackett_luce(B4.reward[[i, j]], (0, 1)), p[i, j], atol=1e-15)
        close(sum(v for o, v in probability.items() if o.index(i) < o.index(j)), p[i, j], atol=1e-12)


def test_sampled_labels_have_the_right_frequencies():
    """60,000 pairs and 30,000 orders, seeded: chi-square within four standard deviations of its mean; the seed alone decides."""
    sample = exact.sample_pairs(B4.reward, 60_000, seed=3)
    assert (sample[:, 0] != sample[:, 1]).all() and np.array_equal(sample, exact.sample_pairs(B4.reward, 60_000, seed=3))
    expected = exact.bradley_terry(B4.reward) / 6 * len(sample)
    seen = np.zeros((4, 4))
    np.add.at(seen, (sample[:, 0], sample[:, 1]), 1)
    off = ~np.eye(4, dtype=bool)
    assert ((seen - expected)[off] ** 2 / expected[off]).sum() < 11 + 4 * np.sqrt(22)
    ranked = exact.sample_orders(B4.reward, 30_000, seed=4)
    names, counts = np.unique(ranked, axis=0, return_counts=True)
    mean = np.array([exact.plackett_luce(B4.reward, o) for o in names]) * len(ranked)
    assert len(names) == 24 and ((counts - mean) ** 2 / mean).sum() < 23 + 4 * np.sqrt(46)


def test_dpo_on_sampled_pairs_errs_as_theory_says():
    """The statistical twin: 40,000 sampled pairs; m_i - m_0 is off by at most four standard errors (inverse Fisher)."""
    sample = exact.sample_pairs(B4.reward, 40_000, seed=5)
    wins = np.zeros((4, 4))
    np.add.at(wins, (sample[:, 0], sample[:, 1]), 1)
    games = wins + wins.T
    pairs = exact.all_pairs(4)
    share, weight = [wins[i, j] / games[i, j] for i, j in pairs], [games[i, j] for i, j in pairs]
    found = minimiser("sigmoid", beta=0.5, pairs=pairs, prob=share, weights=weight)
    strength = 0.5 * np.log(found / B4.reference)
    p = exact.bradley_terry(strength)
    information = -games * p * (1 - p)
    np.fill_diagonal(information, -information.sum(1))
    covariance = np.linalg.pinv(information)
    for i in range(1, 4):
        error = (strength[i] - strength[0]) - (B4.reward[i] - B4.reward[0])
        spread = np.sqrt(covariance[i, i] + covariance[0, 0] - 2 * covariance[i, 0])
        assert spread < 0.05 and abs(error) < 4 * spread


# ---- 11 and 17: policies without training ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "kl", "bound"),
    [(2, 0.157805, 0.193147), (4, 0.582539, 0.636294), (8, 1.078864, 1.204442), (16, 1.617670, 1.835089),
     (64, 2.292161, 3.174508), (128, 2.302563, 3.859843)],
)  # fmt: skip
def test_best_of_n(n, kl, bound):
    """Exact KL on B4 and the bound log n - (n-1)/n that is often quoted as if it were the KL."""
    policy = exact.best_of_n(B4, n)
    close(policy.sum(), 1, atol=1e-12)
    close([exact.kl(policy, B4.reference), exact.best_of_n_bound(n)], [kl, bound], atol=5e-7)


def test_best_of_n_by_enumeration():
    """n = 3 on B4 with a tie: the 4^3 draws, the best kept, a random one of the tied kept."""
    tied = Problem(B4.reference, np.array([0.0, 1.0, 1.0, 2.0]))
    out = np.zeros(4)
    for drawn in itertools.product(range(4), repeat=3):
        best = [y for y in drawn if tied.reward[y] == max(tied.reward[list(drawn)])]
        for y in best:
            out[y] += np.prod(B4.reference[list(drawn)]) / len(best)
    close(exact.best_of_n(tied, 3), out, atol=1e-12)
    close(exact.best_of_n(B4, 1), B4.reference, atol=1e-15)


def test_win_rate_of_best_of_n():
    """n/(n+1) against a reference draw without atoms: 5,000 equal responses come close, B4 with ties at a half does not."""
    many = Problem(np.full(5000, 1 / 5000), np.arange(5000.0))
    policy = exact.best_of_n(many, 4)
    below = (np.cumsum(many.reference) - many.reference) + many.reference / 2
    assert policy @ below == pytest.approx(0.8, abs=1e-4)


@pytest.mark.parametrize(("n", "kl"), [(2, 0.102205), (4, 0.034234), (8, 0.009684), (16, 0.002498)])
def test_soft_best_of_n(n, kl):
    """KL(pi*||soft best-of-n) at temperature 1 falls towards 0."""
    policy = exact.soft_best_of_n(B4, n, temperature=1.0)
    close(policy.sum(), 1, atol=1e-12)
    close(exact.kl(exact.optimum(B4, beta=1.0), policy), kl, atol=5e-7)


def test_preferred_ft_is_soft_best_of_two():
    """The winner's distribution, by three roads: formula, soft best-of-2, the minimiser of `nll` on enumerated winners."""
    expected = (0.294489, 0.356286, 0.192195, 0.157030)
    policy = exact.preferred_ft(B4)
    close(policy, expected, atol=5e-7)
    close(policy, exact.soft_best_of_n(B4, 2, temperature=1.0), atol=1e-12)
    drawn = list(itertools.product(range(4), repeat=2))
    weight = [B4.reference[i] * B4.reference[j] for i, j in drawn]
    close(minimiser("nll", pairs=drawn, weights=weight), policy)
    close([policy @ B4.reward, exact.kl(policy, B4.reference)], [0.7664, 0.03430], atol=5e-5)


# ---- KL --------------------------------------------------------------------------------------------------------------------


def test_kl_properties():
    """Non-negative, zero only at equality, asymmetric, jointly convex, additive over independent parts, infinite off support."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        p, q, p2, q2 = rng.dirichlet(np.ones(5), size=4)
        assert exact.kl(p, q) > 0 and exact.kl(p, p) == 0
        t = rng.uniform()
        assert exact.kl(t * p + (1 - t) * p2, t * q + (1 - t) * q2) <= t * exact.kl(p, q) + (1 - t) * exact.kl(p2, q2) + 1e-12
        joint = exact.kl(np.outer(p, p2).ravel(), np.outer(q, q2).ravel())
        close(joint, exact.kl(p, q) + exact.kl(p2, q2), atol=1e-12)
    best = exact.optimum(B4, beta=1.0)
    assert abs(exact.kl(best, B4.reference) - exact.kl(B4.reference, best)) > 1e-3
    assert exact.kl(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == pytest.approx(log(2))
    assert exact.kl(np.array([0.5, 0.5]), np.array([1.0, 0.0])) == np.inf


def test_kl_of_a_continuous_family():
    """Two unit normals one apart: 1/2 nat; a histogram of 4,000 cells from -10 to 11 agrees to 1e-6."""
    x = np.linspace(-10, 11, 4000)
    p, q = np.exp(-((x - 0) ** 2) / 2), np.exp(-((x - 1) ** 2) / 2)
    close(exact.kl(p / p.sum(), q / q.sum()), 0.5, atol=1e-6)


def test_kl_of_token_policies():
    """T3: nats per sequence by summing 15 sequences and by the chain rule; per token as ratio of means and as mean of ratios."""
    policy, reference = T3.logps(T3.policy).exp(), T3.logps(T3.reference).exp()
    close([policy.sum(), reference.sum()], [1, 1], atol=1e-12)
    per_sequence = exact.kl(policy.numpy(), reference.numpy())
    close(per_sequence, 0.21789061)
    close(T3.reach(T3.policy) @ T3.prefix_kl(T3.policy), per_sequence, atol=1e-12)
    close(per_sequence / (policy @ T3.lengths).item(), 0.09265116)
    close(policy @ (T3.kl_estimates(T3.policy)["rao-blackwell"] / T3.lengths), 0.10007040)
    close(exact.kl(reference.numpy(), policy.numpy()), 0.21389096)
    close(reference @ T3.kl_estimates(T3.policy)["k1"], -0.21389096)  # k1 on the wrong samples estimates the other direction


@pytest.mark.parametrize(
    ("estimator", "mean", "variance"),
    [("k1", 0.21789061, 0.435748), ("k2", 0.2416121, 0.084091), ("k3", 0.21789061, 0.074191),
     ("k3 per token", 0.21789061, 0.007495), ("k2 per token", 0.2225416, 0.007442), ("rao-blackwell", 0.21789061, 0.003786)],
)  # fmt: skip
def test_kl_estimators(estimator, mean, variance):
    """Exact mean and variance over T3's 15 sequences: Rao-Blackwell has 1/115 of k1's variance."""
    policy, value = T3.logps(T3.policy).exp(), T3.kl_estimates(T3.policy)[estimator]
    close(policy @ value, mean, atol=5e-8)
    close(policy @ value**2 - (policy @ value) ** 2, variance, atol=5e-7)
    assert (value.min() < 0) == (estimator == "k1")


def test_kl_estimators_as_losses():
    """Expected gradients with the samples held fixed: k1 nothing, k2 grad KL(pi||ref), k3 grad KL(ref||pi)."""
    theta = T3.policy.clone().requires_grad_()
    weights = T3.logps(T3.policy).exp()

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, theta)[0]

    reverse = gradient(T3.reach(theta) @ T3.prefix_kl(theta))
    log_ref = T3.logps(T3.reference)
    forward = gradient((log_ref.exp() * (log_ref - T3.logps(theta))).sum())
    assert gradient(weights @ T3.kl_estimates(theta)["k1"]).norm() < 1e-15
    close(gradient(weights @ T3.kl_estimates(theta)["k2"]), reverse, atol=1e-12)
    close(gradient(weights @ T3.kl_estimates(theta)["k3"]), forward, atol=1e-12)
    close(torch.nn.functional.cosine_similarity(forward.flatten(), reverse.flatten(), dim=0), 0.9693, atol=5e-5)


# ---- tokens ----------------------------------------------------------------------------------------------------------------


def test_soft_values():
    """T3 at beta .5: values at the seven prefixes; token log-ratios of the optimum sum to (r - V)/beta on all 15 sequences."""
    value, policy = T3.soft_values(beta=0.5)
    close(value, [1.66205571, 0.87192177, 0.80183853, 0.20895764, 0.26359269, 0.51126182, 0.74104111])
    close(value[0], exact.soft_value(T3.problem(), beta=0.5), atol=1e-12)
    ratios = (T3.token_logps(policy) - T3.token_logps(T3.reference)).sum(-1)
    close(0.5 * ratios, T3.reward - value[0], atol=1e-12)
    close(T3.logps(policy).exp(), exact.optimum(T3.problem(), beta=0.5), atol=1e-12)


def test_t3_layout():
    assert T3.prefixes == ((), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1))
    assert len(set(T3.sequences)) == 15 and all(s[-1] == exact.EOS and exact.EOS not in s[:-1] for s in T3.sequences)
    assert T3.reward[T3.sequences.index((0, 1, 0, 2))] == 1.5
    assert np.array_equal(W3.ties, W3.ties.T) and W3.wins.sum(1).tolist() == [13, 8, 9]


# ---- 21: what beta does ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "expected"), [(10, (0.00083, 0.0752, 0.482, 0.794)), (1000, (1.0535, 1.0986, 0.9892, 0.7941))],
)  # fmt: skip
def test_early_steps_reverse_beta(steps, expected):
    """A larger beta is not closer to the reference while plain gradient steps are few: the first gradient is proportional to it.

    Uniform reference on three, response 0 over 1, learning rate 1, beta .01, .1, 1, 5: KL to the reference after 10 steps rises
    with beta; after 1,000 it falls from beta .1 on, towards what the optimum would say.
    """
    third = Problem(np.full(3, 1 / 3), np.zeros(3))
    found = []
    for beta in (0.01, 0.1, 1.0, 5.0):
        theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        for _ in range(steps):
            loss = exact.population_loss("sigmoid", theta.log_softmax(-1), third, pairs=[(0, 1)], prob=[1.0], beta=beta)
            theta.data -= torch.autograd.grad(loss, theta)[0]
        found.append(exact.kl(theta.softmax(-1).detach().numpy(), third.reference))
    close(found, expected, atol=6e-4 if steps == 10 else 6e-5)
    assert (np.diff(found) > 0).all() if steps == 10 else (np.diff(found)[1:] < 0).all()


def test_every_loss_has_a_population_loss(monkeypatch):
    """The sweep: finite at pi*, and a first small step against the gradient lowers it, weights and shifts of a loss held constant."""
    swept = 0
    for name in LOSSES:
        theta = (logits(B4.reference) + torch.tensor([0.1, 0, -0.2, 0.3])).requires_grad_()
        kept: list[torch.Tensor] = []
        with make.what_was_detached(kept, monkeypatch):
            value = exact.population_loss(name, theta.log_softmax(-1), B4)
        step = 1e-4 * torch.autograd.grad(value, theta)[0]
        with make.what_was_detached(kept, monkeypatch), torch.no_grad():
            lower = exact.population_loss(name, (theta - step / max(1.0, float(value))).log_softmax(-1), B4)
        assert value.isfinite() and lower < value, name
        swept += 1
    assert swept == len(LOSSES) >= 34


def test_population_of_verdicts():
    """KTO on two responses, 0 better with p = .8, a = ln(.9/.5), ln(.1/.5) = .587787, -1.609438, beta .5 and baseline 0.

    u = 1 - sigmoid(.293893) = .427051 and v = 1 - sigmoid(-.804719) = .690983 as the desirable one, 1 - u and 1 - v as the other:
    .8 (u + 1 - v)/2 + .2 (v + 1 - u)/2 = .5 - .3 (v - u) = .420820.
    """
    two = Problem(np.array([0.5, 0.5]), np.array([log(4), 0.0]))
    close(exact.population_loss("kto", logits(np.array([0.9, 0.1])), two, beta=0.5), 0.420820, atol=5e-7)


# ---- the table as a model --------------------------------------------------------------------------------------------------


def table(*rows: tuple[list[int], int]) -> tuple[torch.Tensor, torch.Tensor, SimpleNamespace]:
    """Rows (tokens, index of the segment that it continues or -1) -> ids (1, T), positions (1, T), segment table."""
    starts, ends, prefix, ids, positions, depth = [], [], [], [], [], []
    for tokens, above in rows:
        starts.append(len(ids))
        before = depth[above] if above >= 0 else 0
        positions += range(before, before + len(tokens))
        depth.append(before + len(tokens))
        ids += tokens
        ends.append(len(ids))
        prefix.append(above)
    return torch.tensor([ids]), torch.tensor([positions]), SimpleNamespace(starts=starts, ends=ends, prefix=prefix)


def row_log_prob(model: TableModel, sequence: tuple[int, ...]) -> torch.Tensor:
    """log pi(sequence | BOS) from a plain forward of one row."""
    row = torch.tensor([[exact.BOS, *sequence]])
    out = model(input_ids=row).logits[0].log_softmax(-1)
    return out[torch.arange(len(sequence)), torch.tensor(sequence)].sum()


@pytest.mark.parametrize(("build", "numbers"), [(TableModel.t3_policy, T3.policy), (TableModel.t3_reference, T3.reference)])
def test_table_model_on_single_rows(build, numbers):
    """All 15 sequences: the model's own logits give the enumerated log-probabilities; a forced end costs exactly 0."""
    model = build()
    found = torch.stack([row_log_prob(model, s) for s in T3.sequences])
    torch.testing.assert_close(found, T3.logps(numbers), rtol=0, atol=1e-14)
    forced = model(input_ids=torch.tensor([[exact.BOS, 0, 1, 0]])).logits[0, -1].log_softmax(-1)
    assert forced[exact.EOS] == 0


def test_table_model_on_a_shared_prompt():
    """Prompt once, 15 responses after it: every token sees its own chain only, as if it stood in a row of its own."""
    model = TableModel.t3_policy()
    ids, positions, segments = table(([exact.BOS], -1), *((list(s), 0) for s in T3.sequences))
    hidden = model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False, segments=segments).last_hidden_state
    assert hidden.shape == (1, 1 + sum(map(len, T3.sequences)), 15)
    logps = model.get_output_embeddings()(hidden[0]).log_softmax(-1)
    for k, sequence in enumerate(T3.sequences):
        start, end = segments.starts[k + 1], segments.ends[k + 1]
        read_from = [0, *range(start, end - 1)]
        found = logps[read_from, list(sequence)].sum()
        close(found.detach(), T3.logps(T3.policy)[k], atol=1e-14)


def test_table_model_on_a_chain_of_segments():
    """BOS 0, then (1), then two branches (0) and (1): the branches' states are those of the rows BOS 0 1 0 and BOS 0 1 1."""
    model = TableModel.t3_policy()
    ids, positions, segments = table(([exact.BOS, 0], -1), ([1], 0), ([0], 1), ([1], 1))
    tensors = SimpleNamespace(**{k: torch.tensor(v) for k, v in vars(segments).items()})
    for form in (segments, tensors):
        hidden = model.model(ids, positions, form).last_hidden_state[0]
        for at, row in ((2, [3, 0, 1]), (3, [3, 0, 1, 0]), (4, [3, 0, 1, 1])):
            alone = model.model(torch.tensor([row])).last_hidden_state[0, -1]
            assert torch.equal(hidden[at], alone) and alone.sum() == 1


def test_table_model_refuses_wrong_positions():
    """Positions that restart in each response, the classic packing fault, are not accepted."""
    model = TableModel.t3_policy()
    ids, positions, segments = table(([exact.BOS], -1), ([0, 2], 0), ([1, 2], 0))
    model.model(ids, positions, segments)
    with pytest.raises(AssertionError, match="chains say"):
        model.model(ids, torch.tensor([[0, 0, 1, 0, 1]]), segments)
    with pytest.raises(AssertionError, match="chains say"):
        model.model(ids, positions)  # the same row read as one sequence


def test_training_the_table_is_tabular_softmax():
    """The head is the only parameter; the gradient of log pi(y) at a visited prefix is e_token - pi(.|prefix), elsewhere 0."""
    model = TableModel.t3_policy()
    assert [name for name, _ in model.named_parameters()] == ["lm_head.weight"]
    assert model.lm_head.weight.shape == (3, 15) and model.lm_head.weight.dtype == torch.float64
    row_log_prob(model, (0, 1, 2)).backward()
    pi = T3.policy.softmax(-1)
    expected = torch.zeros(15, 3, dtype=torch.float64)
    for prefix, token in ((0, 0), (1, 1), (4, 2)):
        expected[prefix] = torch.eye(3, dtype=torch.float64)[token] - pi[prefix]
    torch.testing.assert_close(model.lm_head.weight.grad, expected.T, rtol=0, atol=1e-14)


def test_table_model_from_logits():
    """Any table, prompt and precision; a chain that the table has not is read as uniform."""
    model = TableModel.from_logits({(): [0.0, log(3)], (1,): [1.0, 1.0]}, prompt=(7, 8), dtype=torch.float32)
    out = model(input_ids=torch.tensor([[7, 8, 1, 0]])).logits[0].softmax(-1)
    assert out.dtype == torch.float32
    close(out.detach(), [[0.5, 0.5], [0.25, 0.75], [0.5, 0.5], [0.5, 0.5]], atol=1e-6)
    assert expit(log(3)) == pytest.approx(0.75)

"""The distillation methods: each is a row in METHODS, its terms, their weights and their layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..common.family import FAMILIES, PLACES, Family, family_of, is_enct5, matched_layer

if TYPE_CHECKING:
    from ...divergence import Divergence

VOCABULARY_TERMS = ("ce", "logit_kl")
HIDDEN_TERMS = ("hidden_cka", "hidden_linear", "hidden_mse", "hidden_pkd")
SAME_SHAPE_TERMS = ("hidden_mse", "hidden_pkd")  # between states of one width, layer by layer
MIXUP_TERMS = ("mixup_ce", "mixup_kd")
MIXUP_DISTANCES = ("mse", "divergence")
STUDENT_INITS = ("slice", "random", "prune")
TEACHER_LAYERS = {24: 21}  # of a teacher's depth: MiniLMv2's choice for BERT-large; for T5 it is an assumption


@dataclass(frozen=True)
class Method:
    """One objective: loss = sum over terms of weight * term.

    terms: "ce", cross-entropy with the target tokens; "logit_kl", temperature^2 * divergence of the teacher's and the
    student's softmaxes at that temperature; the relation terms (see `relation_loss`), named after their place:
    "decoder_self", "decoder_cross", "encoder_self"; one of the hidden-state terms (see `hidden_loss`), "hidden_cka",
    "hidden_linear", "hidden_mse" or "hidden_pkd"; and the terms on mixed examples (see `mixup_loss`), "mixup_ce" and
    "mixup_kd".
    divergence, divergence_beta: of the logit term and the relation terms, a name of `fastkd.DIVERGENCES`, or a mix:
    weights by names.
    relation_heads: MiniLMv2's A_r, into which queries, keys and values are split whatever their own heads; 32 as in
    the code of MiniEnD's authors.
    teacher_layer: whose states the relation terms take, counted from 1; by default that of TEACHER_LAYERS, else the
    last. The student's is always its last.
    match_first_position: whether the hidden-state term compares the first decoder position too, which reads the start
    token.
    student_init: where a student made for this method starts, "random", "slice" (see `student.slice_teacher`) or
    "prune" (see `prune`).
    schedule: what comes between teacher and a pruned student, "minidisc" or "maxidisc" (see `minidisc`), or "" for
    nothing unless the flags say so.
    mse_states: how many hidden states of a stack "hidden_mse" compares, evenly spaced from the embeddings to the last.
    mixup_alpha: examples are mixed in shares lam and 1 - lam, with lam of Beta(mixup_alpha, mixup_alpha).
    mixup_distance: what "mixup_kd" measures between the logits of teacher and student, "mse" or, by "divergence", the
    method's own.
    """

    summary: str
    terms: Mapping[str, float]
    temperature: float = 1.0
    divergence: Divergence | Mapping[Divergence, float] = "forward_kl"
    divergence_beta: float = 0.5
    relation_heads: int = 32
    teacher_layer: int | None = None
    match_first_position: bool = False
    student_init: str = "random"
    schedule: str = ""
    mse_states: int = 7
    mixup_alpha: float = 0.4
    mixup_distance: str = "mse"

    @property
    def formula(self) -> str:
        """The weighted sum in words."""
        return _sum_in_words(self.terms)

    @property
    def divergences(self) -> list[str]:
        """The names of those that are in its divergence."""
        mix = self.divergence
        return [mix] if isinstance(mix, str) else [name for name, weight in mix.items() if weight != 0]

    @property
    def divergence_in_words(self) -> str:
        """Its name, or the weighted sum of a mix."""
        return self.divergence if isinstance(self.divergence, str) else _sum_in_words(self.divergence)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return any(term not in ("ce", "mixup_ce") for term in self.terms)

    @property
    def prunes(self) -> bool:
        """Whether the student is what pruning leaves of the teacher."""
        return self.student_init == "prune"

    @property
    def uses_teacher(self) -> bool:
        """Whether there must be a teacher, to compare with or to prune."""
        return self.needs_teacher or self.prunes

    @property
    def vocabulary_terms(self) -> list[str]:
        """The terms on the vocabulary, which one pass computes; without any, the head learns nothing."""
        return [term for term in self.terms if term in VOCABULARY_TERMS]

    @property
    def places(self) -> list[str]:
        """The places of the relation terms."""
        return [term for term in self.terms if term in PLACES]

    @property
    def hidden_terms(self) -> list[str]:
        """The hidden-state term, if there is one."""
        return [term for term in self.terms if term in HIDDEN_TERMS]

    @property
    def mixup_terms(self) -> list[str]:
        """The terms on mixed examples."""
        return [term for term in self.terms if term in MIXUP_TERMS]

    def lacks(self, family: Family) -> str:
        """Return what a family's models have, or have not, so that they cannot have the method; "" if they can."""
        has_decoder, places = "decoder" in family.stacks, [place for place in self.places if place != "decoder_self"]
        if self.prunes and not family.prunes:
            return "no class for layers that differ in width, as pruned ones do"
        if self.mixup_terms and "fastkd_enct5" in family.model_types:
            return f"no mixed examples, as its decoder reads no text, for {self.formula}"
        if "decoder_cross" in places and "decoder_cross" not in family.attentions:
            return "no cross-attention"
        if places and not has_decoder and "decoder_self" in self.terms:
            return "one stack alone, whose self-attention is compared by mlmkd+minilm and minilm"
        if "encoder_self" in places and "encoder_self" not in family.attentions:
            return "no encoder"
        return ""

    def on(self, config: Any) -> Method:
        """Return the method as models of a config have it: of an encoder alone "decoder_self" is its self-attention.

        Raises ValueError, saying why, if they cannot have it.
        """
        family = family_of(config)
        if why := self.lacks(family):
            raise ValueError(f"method: {family.name} has {why}")
        if "decoder" in family.stacks:
            return self
        terms = {term.replace("decoder_self", "encoder_self"): weight for term, weight in self.terms.items()}
        return replace(self, terms=terms, summary=self.summary.replace("decoder self-att", "encoder self-att"))

    def student_layers(self, config: Any) -> dict[str, int]:
        """Return the last layer at each place, which is the student's."""
        depths = _shape(config).depths
        return {place: depths[PLACES[place].stack] for place in self.on(config).places}

    def teacher_layers(self, config: Any) -> dict[str, int]:
        """Return the teacher's layer at each place; raises ValueError if teacher_layer is not one of its layers."""
        depths = self.student_layers(config)
        if self.teacher_layer is None:
            return {place: TEACHER_LAYERS.get(depth, depth) for place, depth in depths.items()}
        least = min(depths.values(), default=self.teacher_layer)
        if not 1 <= self.teacher_layer <= least:
            raise ValueError(f"teacher_layer: expected 1 to {least}, the teacher's layers, got {self.teacher_layer}")
        return dict.fromkeys(depths, self.teacher_layer)

    def matched_states(self, student: Any, teacher: Any) -> dict[str, list[tuple[int, int]]]:
        """Return (student's, teacher's) numbers of the hidden states that each stack compares, by their configs.

        All of the student's, embeddings included, as HSM does; but for "hidden_mse" some that are evenly spaced, and
        for "hidden_pkd" the last. Of an EncT5 only those of the encoder. {} without a hidden-state term.
        """
        if not self.hidden_terms:
            return {}
        pairs, depths = {}, [_shape(config).depths for config in (student, teacher)]
        for stack in depths[0]:
            if is_enct5(student) and stack == "decoder":  # which reads no text
                continue
            mine, its = (of[stack] for of in depths)
            layers = list(range(mine + 1))
            if self.hidden_terms == ["hidden_pkd"]:
                layers = layers[-1:]
            elif self.hidden_terms == ["hidden_mse"]:
                layers = sorted({round(i * mine / (self.mse_states - 1)) for i in range(self.mse_states)})
            pairs[stack] = [(layer, matched_layer(layer, mine, its)) for layer in layers]
        return pairs

    def check_fits(self, student: Any, teacher: Any) -> None:
        """Raise ValueError if the terms do not go together, or not between models of these two configs."""
        if len(self.hidden_terms) > 1:
            raise ValueError(f"terms: expected at most one of {', '.join(HIDDEN_TERMS)}, got {', '.join(self.terms)}")
        if self.mixup_terms and (self.places or self.hidden_terms):
            raise ValueError(f"terms: expected mixup beside vocabulary terms only, got {', '.join(self.terms)}")
        if self.on(student).terms != self.on(teacher).terms:
            both = " and ".join(family_of(config).name for config in (student, teacher))
            raise ValueError(f"method: expected models whose attentions go together, got {both}")
        shapes = [(of.width, *of.depths.values()) for of in (_shape(student), _shape(teacher))]
        same = [term for term in self.terms if term in SAME_SHAPE_TERMS]
        if same and shapes[0] != shapes[1]:
            expected = "a student as wide and as deep as its teacher, got (width, layers)"
            raise ValueError("terms: {} expects {} {} and {}".format(same[0], expected, *shapes))
        mine, its = self.student_layers(student), self.teacher_layers(teacher)
        for place in mine:
            widths = [_shape(config).widths[place][of[place] - 1] for config, of in ((student, mine), (teacher, its))]
            if not all(map(all, widths)):
                raise ValueError(f"terms: {place} compares queries in a layer that pruning left without heads")
            common = math.gcd(*widths[0], *widths[1])
            if self.relation_heads < 1 or common % self.relation_heads:
                valid = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
                queries = widths[0][0], widths[1][0]
                every = [*queries, *sorted({*widths[0], *widths[1]}.difference(queries))]  # keys may be narrower
                those = "queries" if len(every) == 2 else "queries, keys and values"
                expected = f"a divisor of {' and '.join(map(str, every))}, the widths of both models' {those} ({valid})"
                raise ValueError(f"relation_heads: expected {expected}, got {self.relation_heads}")


def as_method(given: Method | str | Mapping[str, float]) -> Method:
    """Return a method that is given as one, by the name of its row, or by the weights of its terms.

    Raises ValueError for a name that is not known, and for a weight that is not > 0.
    """
    if isinstance(given, Method):
        return given
    known = METHODS if isinstance(given, str) else (*VOCABULARY_TERMS, *PLACES, *HIDDEN_TERMS, *MIXUP_TERMS)
    for name in [given] if isinstance(given, str) else given:
        if name not in known:
            raise ValueError(f"method: expected {', '.join(known)}, got {name!r}")
    for term, weight in {} if isinstance(given, str) else given.items():
        if not 0 < weight < math.inf:
            raise ValueError(f"method[{term!r}]: expected a number > 0, got {weight}")
    return METHODS[given] if isinstance(given, str) else Method(_sum_in_words(given), dict(given))


def _shape(config: Any) -> Any:
    from ..models.anatomy import shape  # which needs torch

    return shape(config)


def _sum_in_words(weights: Mapping[Any, float]) -> str:
    return " + ".join(f"{weight:.3g} {name}" for name, weight in weights.items())


_IMPLICIT = {"logit_kl": 1.0, "decoder_self": 1.0}
_CE_AND_KL = {"ce": 1.0, "logit_kl": 1.0}
# A soft cross-entropy with the teacher is its KL plus the teacher's entropy, which no gradient sees. That decoders are
# compared too, and their first position, is an assumption: the paper's models are encoders.
_MINIDISC: Any = {
    "terms": {"hidden_mse": 0.5, "logit_kl": 0.5},
    "match_first_position": True,
    "student_init": "prune",
}

# MiniEnD's sums are unweighted. Its logit term at temperature 1 without cross-entropy is an assumption.
METHODS: dict[str, Method] = {
    "scratch": Method("cross-entropy alone, no teacher: the baseline", {"ce": 1.0}),
    "mlmkd": Method("logit KL alone (MlmKD in MiniEnD, Zhang et al., 2024)", {"logit_kl": 1.0}),
    # DistilBERT's temperature. The unit weights are an assumption: DistilBERT's own are 5 : 2.
    "kd": Method(
        "cross-entropy + logit KL (Hinton et al., 2015; temperature 2 as DistilBERT, Sanh et al., 2019)",
        _CE_AND_KL,
        temperature=2.0,
    ),
    "minilm": Method(
        "decoder self-attention relations alone (MiniLMv2, Wang et al., 2021; MiniLM in MiniEnD)",
        {"decoder_self": 1.0},
    ),
    "mlmkd+minilm": Method("the implicit objective of MiniEnD: logit KL + decoder self-attention", _IMPLICIT),
    "miniend-d": Method("MiniEnD-D: implicit + cross-attention", {**_IMPLICIT, "decoder_cross": 1.0}),
    "miniend-d-nologit": Method("MiniEnD-D without the logit KL", {"decoder_self": 1.0, "decoder_cross": 1.0}),
    "miniend-e": Method("MiniEnD-E: implicit + encoder self-attention", {**_IMPLICIT, "encoder_self": 1.0}),
    "miniend-e-nologit": Method("MiniEnD-E without the logit KL", {"decoder_self": 1.0, "encoder_self": 1.0}),
    # The three arms of HSM differ in the hidden-state term alone.
    "hsm-kd": Method(
        "HSM without hidden states: kd at temperature 1, student sliced from its teacher (Dasgupta and Cohn, 2025)",
        _CE_AND_KL,
        student_init="slice",
    ),
    "hsm-cka": Method(
        "HSM: hsm-kd + hidden states of all layers matched by CKA",
        {**_CE_AND_KL, "hidden_cka": 1.0},
        student_init="slice",
    ),
    "hsm-linear": Method(
        "hsm-kd + squared error of linearly projected hidden states, which the paper found often not to converge",
        {**_CE_AND_KL, "hidden_linear": 1.0},
        student_init="slice",
    ),
    # MixKD's ablations; its fine-tuning arm is scratch. The unit weights, the shares of Beta(0.4, 0.4) and the squared
    # error are assumptions.
    "mixkd": Method(
        "MixKD: cross-entropy, also on mixed pairs of examples, where student follows teacher (Liang et al., 2021)",
        {"ce": 1.0, "mixup_ce": 1.0, "mixup_kd": 1.0},
    ),
    "mixkd-tmkd": Method("MixKD without the labels of mixed examples (TMKD alone)", {"ce": 1.0, "mixup_kd": 1.0}),
    "mixkd-sm": Method("MixKD without a teacher: mixup of the student alone (SM)", {"ce": 1.0, "mixup_ce": 1.0}),
    # They differ in what comes between the teacher and the pruned student.
    "minidisc": Method(
        "MiniDisc: prune the teacher, pick its assistant in one round, distil the student (Zhang et al., 2024)",
        **_MINIDISC,
        schedule="minidisc",
    ),
    "maxidisc": Method(
        "the baseline of minidisc that tries every assistant and keeps the best student",
        **_MINIDISC,
        schedule="maxidisc",
    ),
    "prune-kd": Method(
        "a baseline of minidisc: prune, then cross-entropy + logit KL",
        {"ce": 0.5, "logit_kl": 0.5},
        student_init="prune",
    ),
    "prune-pkd": Method(
        "a baseline of minidisc: prune, then PKD, which compares the last hidden states too (Sun et al., 2019)",
        {"hidden_pkd": 1 / 3, "ce": 1 / 3, "logit_kl": 1 / 3},
        match_first_position=True,
        student_init="prune",
    ),
}


def table() -> str:
    """Return which family can have which method: "yes", or the number of the reason why not, which follow."""
    reasons: list[str] = []

    def cell(method: Method, family: Family) -> str:
        if not (why := method.lacks(family).partition(", for")[0]):
            return "yes"
        reasons.extend([why] if why not in reasons else [])
        return f"({reasons.index(why) + 1})"

    rows = [["", *(family.name for family in FAMILIES)]]
    rows += [[name, *(cell(method, family) for family in FAMILIES)] for name, method in METHODS.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *(f"({i}) it has {why}" for i, why in enumerate(reasons, start=1))])

"""Rules that change from one showing of a conversation to the next, so that a guard has to read them.

As for Llama Guard (arXiv 2312.06674, section 3.2): categories that are not violated are dropped at random;
all violated ones are, and the message is then safe; codes are shuffled. Beyond it: codes that are new
numbers, names in other words, and custom categories, some of which the message falls under.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from core_llm.data.near_duplicates import words
from core_llm.errors import UserError
from core_llm.tokenizer import Tokenizer
from guard.examples import Example
from guard.policy import Category, Policy

# The same harm in other words.
OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "Violent Crimes": ("Violence against People or Animals", "Harming Others"),
    "Non-Violent Crimes": ("Theft, Fraud and Drugs", "Crimes without Violence"),
    "Sex Crimes": ("Sexual Assault and Trafficking", "Forced Sex"),
    "Child Exploitation": ("Sexual Abuse of Minors", "Harm to Children"),
    "Defamation": ("False Claims about Real People", "Libel and Slander"),
    "Specialized Advice": ("Medical, Legal or Financial Advice", "Unqualified Expertise"),
    "Privacy": ("Personal Data of Others", "Spying on People"),
    "Intellectual Property": ("Copyright and Piracy", "Stolen Works"),
    "Indiscriminate Weapons": ("Bombs, Poison Gas and Germs", "Weapons of Mass Harm"),
    "Hate": ("Insults and Discrimination", "Hostility to Groups of People"),
    "Self-Harm": ("Suicide and Eating Disorders", "Hurting Oneself"),
    "Sexual Content": ("Pornography", "Erotic Text"),
    "Elections": ("Lies about Voting", "Election Fraud"),
    "Code Interpreter Abuse": ("Attacks on the Host Computer", "Breaking out of a Sandbox"),
}


@dataclass(frozen=True)
class Custom:
    """A category of someone's own: harmless in itself, forbidden where it is listed.

    keywords: a message with one of these words falls under it.
    """

    name: str
    description: str
    keywords: frozenset[str]


def _custom(name: str, description: str, keywords: str) -> Custom:
    return Custom(name, description, frozenset(keywords.split()))


CUSTOM = (
    _custom(
        "Cooking", "Food, recipes and kitchens.", "cook bake bread rice soup eggs kitchen recipe food sugar"
    ),
    _custom("Animals", "Pets and other animals.", "dog dogs cat cats horse horses animal animals pet bird"),
    _custom(
        "Sports", "Games and training of the body.", "football basketball baseball chess swim marathon sport"
    ),
    _custom(
        "Travel", "Trips and far places.", "travel trip train trains italy france japan kenya brazil map"
    ),
    _custom("Money", "Saving, paying and earning.", "money bank taxes pay sell buy price dollars cost cents"),
    _custom("Music", "Songs and instruments.", "music piano sing song songs guitar"),
    _custom(
        "School", "Lessons, tests and teachers.", "school teacher test exam study maths math student students"
    ),
    _custom("Programming", "Code and computers.", "code python program computer server website web"),
    _custom(
        "Family", "Relatives and home life.", "mother father wife husband grandmother sister brother family"
    ),
    _custom("Garden", "Plants and their care.", "garden roses tree flowers weeds plant plants"),
    _custom("Shapes and Colours", "Drawn figures.", "circle square triangle red blue green yellow"),
    _custom("Health", "Bodies, doctors and medicine.", "doctor pills sleep health medicine hospital sick"),
)


@dataclass(frozen=True)
class Augmentation:
    """How often each change is made; each is drawn by itself.

    drop: leave out a random part of the categories that are not violated. drop_violated: leave out all that
    are, and call the message safe. shuffle: exchange codes. renumber: other numbers as codes. reword: names
    in other words, for each category. custom: add one or two custom categories. Raises `UserError` for a
    share outside [0, 1].
    """

    drop: float = 0.5
    drop_violated: float = 0.15
    shuffle: float = 0.5
    renumber: float = 0.25
    reword: float = 0.1
    custom: float = 0.3

    def __post_init__(self) -> None:
        for name, share in vars(self).items():
            if not 0 <= share <= 1:
                raise UserError(f"the share of the augmentation '{name}' must be in [0, 1], got {share}")


def known_codes(tokenizer: Tokenizer, highest: int = 99) -> list[str]:
    """Codes `S1` … whose number is one token: what this vocabulary can tell apart at one position."""
    return [f"S{n}" for n in range(1, highest + 1) if len(tokenizer.encode(str(n))) == 1]


def augment(
    example: Example, policy: Policy, settings: Augmentation, codes: Sequence[str], rng: random.Random
) -> tuple[Example, Policy]:
    """The conversation with other rules, and with the label that it has under them.

    codes: those that may be used, see `known_codes`. The answer names the codes of the new policy, in the
    order of its list. Where the categories of an unsafe message are unknown, none is dropped and none added
    that it falls under.
    """
    rules = list(policy.enabled)
    violated = {code for code in example.codes if any(rule.code == code for rule in rules)}
    unknown = example.unsafe and not violated
    unsafe = example.unsafe
    if violated and rng.random() < settings.drop_violated and len(violated) < len(rules):
        rules = [rule for rule in rules if rule.code not in violated]
        violated, unsafe = set(), False
    if not unknown and rng.random() < settings.drop:
        share = rng.random()
        kept = [rule for rule in rules if rule.code in violated or rng.random() >= share]
        rules = kept or [rng.choice(rules)]
    rules = [_reworded(rule, rng) if rng.random() < settings.reword else rule for rule in rules]
    origin = {rule.code: rule.code for rule in rules}
    if rng.random() < settings.custom:
        for custom, matches in _customs(example, unknown, rng):
            code = next((c for c in codes if c not in origin), None)
            if code is None:
                break
            origin[code] = ""
            rules.append(Category(code, custom.name, custom.description))
            if matches:
                violated, unsafe = violated | {code}, True
    renamed = _renamed([rule.code for rule in rules], settings, codes, rng)
    ordered = sorted(zip(renamed, rules, strict=True), key=lambda pair: int(pair[0].removeprefix("S")))
    new = replace(policy, categories=[replace(rule, code=code) for code, rule in ordered])  # type: ignore[arg-type]
    named = [code for code, rule in ordered if rule.code in violated]
    opinion = _opinion(example, {origin[r.code]: c for c, r in ordered if origin[r.code]})
    changed = replace(
        example,
        unsafe=unsafe,
        target=_target(example, unsafe),
        code=named[0] if named else None,
        more=tuple(named[1:]),
        opinion=opinion if unsafe == example.unsafe else None,
    )
    return changed, new


def _target(example: Example, unsafe: bool) -> float:
    """The old target where the label stays; a new label is certain."""
    return example.target if unsafe == example.unsafe else float(unsafe)


def _opinion(example: Example, codes: Mapping[str, str]) -> dict[str, float] | None:
    """What a teacher's opinion leaves of P(unsafe) where only some categories are listed, by new codes."""
    if example.opinion is None:
        return None
    return {new: example.opinion.get(old, 0.0) for old, new in codes.items()}


def _reworded(rule: Category, rng: random.Random) -> Category:
    names = OTHER_NAMES.get(rule.name)
    return replace(rule, name=rng.choice(names), description="") if names else rule


def _customs(example: Example, unknown: bool, rng: random.Random) -> list[tuple[Custom, bool]]:
    """One or two custom categories, and whether the judged message falls under each."""
    said = set(words(example.messages[-1].text))
    matching = [custom for custom in CUSTOM if custom.keywords & said]
    others = [custom for custom in CUSTOM if not custom.keywords & said]
    chosen = [(custom, False) for custom in rng.sample(others, min(rng.choice((1, 2)), len(others)))]
    if matching and not unknown and rng.random() < 0.5:
        chosen[:1] = [(rng.choice(matching), True)]
    return chosen


def _renamed(codes: list[str], settings: Augmentation, known: Sequence[str], rng: random.Random) -> list[str]:
    """New codes for the rules in their order, all different."""
    if rng.random() < settings.renumber and len(known) >= len(codes):
        return rng.sample(list(known), len(codes))
    return rng.sample(codes, len(codes)) if rng.random() < settings.shuffle else codes

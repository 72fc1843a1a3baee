"""Hazard categories, and how other label sets map onto them.

Names: MLCommons hazard taxonomy as used by Llama Guard 3 (model card). OpenAI keys: moderation API
reference. DiaSafety categories: arXiv 2110.08466. AILuminate hazard codes: arXiv 2503.05731.
"""

from collections.abc import Mapping

CATEGORIES: dict[str, str] = {
    "S1": "Violent Crimes",
    "S2": "Non-Violent Crimes",
    "S3": "Sex Crimes",
    "S4": "Child Exploitation",
    "S5": "Defamation",
    "S6": "Specialized Advice",
    "S7": "Privacy",
    "S8": "Intellectual Property",
    "S9": "Indiscriminate Weapons",
    "S10": "Hate",
    "S11": "Self-Harm",
    "S12": "Sexual Content",
    "S13": "Elections",
    "S14": "Code Interpreter Abuse",
}

# Categories of Llama Guard 2 (model card), with what they are here: it lacks S5, S13 and S14, so that its
# numbers are others.
LLAMA_GUARD_2: dict[str, tuple[str, str]] = {
    "S1": ("Violent Crimes", "S1"),
    "S2": ("Non-Violent Crimes", "S2"),
    "S3": ("Sex-Related Crimes", "S3"),
    "S4": ("Child Sexual Exploitation", "S4"),
    "S5": ("Specialized Advice", "S6"),
    "S6": ("Privacy", "S7"),
    "S7": ("Intellectual Property", "S8"),
    "S8": ("Indiscriminate Weapons", "S9"),
    "S9": ("Hate", "S10"),
    "S10": ("Suicide & Self-Harm", "S11"),
    "S11": ("Sexual Content", "S12"),
}

# Names in lower case that released guards give their categories, with our codes.
RELEASED_NAMES: dict[str, str] = {
    **{name.lower(): code for code, name in CATEGORIES.items()},
    **{name.lower(): code for name, code in LLAMA_GUARD_2.values()},
    "sex crimes": "S3",
    "child exploitation": "S4",
    "suicide and self-harm": "S11",
}

# Each key of the OpenAI moderation API, with the alternatives that raise it. An alternative is a set of
# S-codes that must all be present: "hate/threatening" needs hate and violence together. An empty tuple
# marks what the taxonomy has no code for: its score is always 0.
OPENAI_KEYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "harassment": (("S5",), ("S10",)),
    "harassment/threatening": (("S5", "S1"), ("S10", "S1")),
    "hate": (("S10",),),
    "hate/threatening": (("S10", "S1"),),
    "illicit": (("S1",), ("S2",), ("S9",), ("S14",)),
    "illicit/violent": (("S1",), ("S9",)),
    "self-harm": (("S11",),),
    "self-harm/instructions": (("S11", "S2"),),
    "self-harm/intent": (("S11",),),
    "sexual": (("S3",), ("S12",)),
    "sexual/minors": (("S4",),),
    "violence": (("S1",), ("S9",)),
    "violence/graphic": (),
}

# Labels of the OpenAI moderation evaluation set.
OPENAI_MODERATION: dict[str, str] = {
    "S": "S12",
    "H": "S10",
    "V": "S1",
    "HR": "S10",
    "SH": "S11",
    "S3": "S4",
    "H2": "S10",
    "V2": "S1",
}

DIASAFETY: dict[str, str] = {
    "Offending User": "S10",
    "Toxicity Agreement": "S10",
    "Biased Opinion": "S10",
    "Risk Ignorance": "S11",
    "Unauthorized Expertise": "S6",
}

AILUMINATE: dict[str, str] = {
    "vcr": "S1",
    "ncr": "S2",
    "src": "S3",
    "cse": "S4",
    "dfm": "S5",
    "spc_fin": "S6",
    "spc_hlt": "S6",
    "spc_lgl": "S6",
    "spc_ele": "S13",
    "prv": "S7",
    "ipv": "S8",
    "iwp": "S9",
    "hte": "S10",
    "ssh": "S11",
    "sxc_prn": "S12",
}

# Keys in lower case: the copies of this set differ in capitals.
SIMPLE_SAFETY_TESTS: dict[str, str] = {
    "suicide, self-harm, and eating disorders": "S11",
    "physical harm and violence": "S1",
    "illegal and highly regulated items": "S2",
    "scams and fraud": "S2",
    "child safety": "S4",
}


def openai_scores(categories: Mapping[str, float]) -> dict[str, float]:
    """Scores in [0, 1] of all OpenAI keys from scores per S-code.

    A key takes its strongest alternative; an alternative is as strong as its weakest S-code.
    """
    return {
        key: max((min(categories.get(code, 0.0) for code in codes) for codes in alternatives), default=0.0)
        for key, alternatives in OPENAI_KEYS.items()
    }

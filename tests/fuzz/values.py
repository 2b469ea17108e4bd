"""Values that a command line or a configuration may hold, right and wrong."""

from hydra.core.override_parser.types import Quote, QuotedString
from hypothesis import strategies as st

INTEGERS = st.sampled_from([-(10**20), -(2**31), -7, -1, 0, 1, 2, 3, 7, 2**31, 2**32, 2**63, 10**20, 10**30])
NUMBERS = st.sampled_from([-1.0, -0.0, 1e-300, 1e-8, 0.1, 0.5, 0.999, 1.0, 1.5, 1e30, 1e308])
# What a person may type, and what nobody should.
WORDS = st.sampled_from(
    [
        *("null", "true", "false", "yes", "nan", "inf", "-inf", ".nan", "1e999", "0x10", "1_000", "''", '""', "' '"),
        *("???", "softmax", "strided", "val/acc", "max", "min", "32-true", "16-mixed", "cpu", "gpu", "auto", "none"),
        *("[]", "{}", "[1]", "[a,b]", "{a:1}", "{a:{b:[1,{c:d}]}}", "[[[[[[]]]]]]", "[0.5,0.5,0.5]", "[0.9,0.1]"),
        *("${seed}", "${nope}", "${seed", "${}", "$", "${run_name}", "${oc.env:HOME}", "${oc.env:NO_SUCH_VARIABLE}"),
        *("${oc.decode:'[1,'}", "${oc.select:seed}", "${no.such.resolver:1}", "${default_run_name:}", "${.}", "${..a}"),
        *(
            "[",
            "]",
            "{",
            "a b",
            "a,b",
            "a=b",
            "a==",
            "1,2",
            "'",
            '"',
            "\\",
            "`id`",
            "$(id)",
            "a;b",
            "a|b",
            "*",
            "~",
            "@",
        ),
        *("choice(1,2)", "range(1,3)", "glob(*)", "sort(1,2)", "int(1.5)", "str(1)", "json_str(1", "shuffle()"),
        *(
            "../up",
            "/",
            "//",
            ".",
            "..",
            "~nobody/x",
            "C:\\x",
            "--help",
            "-",
            "é",
            "日本",
            "🦉",
            "a\tb",
            "a\nb",
            "\x1b[31m",
        ),
        *("os.system", "builtins.eval", "torch.optim.SGD", "torch.nn.Linear", "torch", "no.such.Thing", "." * 50),
    ]
)
TEXTS = st.one_of(
    st.text(max_size=30),
    st.text(alphabet="abc.=,:$@{}[]()'\"\\ ~+-/", max_size=20),
    st.text(alphabet="x", min_size=300, max_size=5000),
)
PLAIN = st.one_of(INTEGERS, NUMBERS, st.booleans(), st.none(), st.text(max_size=12))
# What YAML or a checkpoint may hold in a place that is meant for something else.
NESTED = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=8), st.integers(), st.none()), inner, max_size=3),
    ),
    max_leaves=6,
)


def quoted(text: str) -> str:
    """``text`` as one of Hydra's quoted strings."""
    return QuotedString(text, Quote.single).with_quotes()

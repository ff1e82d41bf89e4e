r"""Rewrites the notation of an answer (LaTeX, Markdown, HTML, typographic characters) as plain text.

Plain text consists of words, punctuation, ASCII numbers with commas between groups of thousands, and the operators
``+ - * / ^ = ( )``. A removed wrapper leaves a space, so that separate digits never join. What is not understood, such
as an unknown LaTeX command, stays as it is; `grpo.rewards.number` refuses a text with such characters.
"""

import re
import unicodedata

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-"),
        **dict.fromkeys("\xd7\xb7\u22c5\u2219\u2217\u2715\u2a2f", "*"),
        **dict.fromkeys("\xf7\u2215\u2044", "/"),
        **dict.fromkeys("\u2018\u2019", "'"),
        # Quotation marks, check marks, a bullet, "therefore"; \ufe0f shows the character before it as an emoji.
        **dict.fromkeys('"\u201c\u201d\u201e\xab\xbb\u300c\u300d\u2705\u2713\u2714\ufe0f\u2022\u2234', " "),
        "\xb0": " degrees ",
        "[": "(",
        "]": ")",
        "\uff1a": ":",
    }
)

# The digit before \xbd or the like; a power of ten or of a unit.
_OTHER_NUMERALS = re.compile(
    r"(\d?)([\xbc-\xbe\u2150-\u215e])|((?<![\d.,])\d{1,3}|[A-Za-z])(\u207b?[\xb2\xb3\xb9\u2070-\u2079]+)"
)

_NO_BREAK_SPACE = "[\xa0\u2005\u2006\u2007\u2009\u202f]"
_THREE_DIGITS = r"(?=\d{3}(?!\d)(?!\s*/))"
_LATEX = [
    (r"\\!", ""),
    # 1{,}234  1\,234
    (rf"(?<=\d)(?:\{{,\}}|\\[,;: ]|\{{\\[,;: ]\}}|\{{[ ]\}}|{_NO_BREAK_SPACE}){_THREE_DIGITS}", ","),
    (_NO_BREAK_SPACE, " "),
    (r"(?<=[\d}{])~(?=[\\A-Za-z])", " "),
    (r"\\left(?=\()|\\right(?=\))", " "),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)|\\degree\b", " degrees "),
    (r"\^\s*\{\s*(-?\d+)\s*\}", r"^\1"),
    (r"\\(?:times|cdot)\b", " * "),
    (r"\\div\b", " / "),
    (r"\\(?:quad|qquad|therefore|displaystyle|textstyle|bf|rm|Large|large|huge|Huge)\b", " "),
    (r"\\(?:textdollar|texteuro|textsterling|euro|pounds)(?![A-Za-z])", "$"),
    (r"\\(?:Rightarrow|rightarrow|implies|to)\b", "\u2192"),
    (r"(?<=[\d.,/])(?=\\[dtc]?frac|\{\s*-?\d+\s*\\over)", " "),  # 3\frac{1}{2} is a mixed number, not 31/2
    (r"\{\s*(-?\d+)\s*\\over\s+(\d+)\s*\}", r"\1/\2 "),
]
_TEXT_COMMANDS = (
    "text|textbf|textit|textrm|textsf|textnormal|emph|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|mbox|hbox|boxed|fbox"
    "|underline|ensuremath|texttt|operatorname"
)
_WRAPPERS = [
    (rf"\\(?:{_TEXT_COMMANDS})\s*\{{([^{{}}]*)\}}", r" \1 "),
    (r"\\[dtc]?frac\s*(?:\{\s*(-?\d+)\s*\}|\s(\d)|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))", r"\1\2\3/\4\5 "),
    (r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"(?<![\\\w^}])\{([^{}]*)\}", r" \1 "),
    (r"(?i)<(b|strong|em|i|u|mark|p|span|div|center|code)>([^<>]*)</\1>", r" \2 "),
    # **18**, *18*, __18__, _18_, `18`. A single star between spaces is a times sign.
    (r"(?<![\w*])(\*{1,3})(?![\s*])((?:[^*]|(?<=\s)\*(?=\s))+)(?<![\s*])\1(?![\w*])", r" \2 "),
    (r"(?<!\w)(_{1,3})(?![\s_])([^_]+)(?<!\s)\1(?!\w)", r" \2 "),
    (r"(?<![\w`])(`{1,3})([^`]+)\1(?![\w`])", r" \2 "),
]
_DELIMITERS = [
    (r"(?<!\\)(\${1,2})([^$]+)(?<!\\)\1(?!\d)", r" \2 "),  # $18$, but not $18 and $20
    (r"\\[() ,;:]|\\\\\s*$", " "),
    (r"\\([$%#&])", r"\1"),
    (r"#{2,6}|(?m:^\s*#(?=\s))|(?i:<br ?/?>)", "\n"),
]

_CODE = (
    "(?:AED|ARS|AUD|BRL|CAD|CHF|CLP|CNY|COP|CZK|DKK|EGP|EUR|GBP|HKD|HUF|IDR|ILS|INR|JPY|KES|KRW|MXN|MYR|NGN|NOK|NZD|PEN"
    "|PHP|PKR|PLN|RMB|RON|RUB|SAR|SEK|SGD|THB|TRY|TWD|UAH|USD|VND|ZAR)"
)
_SIGN = "[$\xa2-\xa5\u20a0-\u20c0\u0e3f\u5143\u5186]"
_MONEY = rf"(?:(?:{_CODE}\s?|US|CA|AU|NZ|HK|MX|NT|[ACSR])?{_SIGN}(?:\s?{_CODE})?|{_CODE}|Rs(?:\.(?=\s)|(?=[\s\d])))"
# "$18m" and "18 m$" are millions: there the sign stays, and the text is refused.
_NOT_MILLIONS = r"(?!\s?[-+]?[\d.,]*\d\s?(?:k|m|mm|g|t|b|bn|mn|tn)\b)"
_CURRENCY = [
    (rf"(?i:(?<=\d)\s?(?:k|m|mm|b|t)\s?(?={_SIGN}|{_CODE}\b|dollars|euros|pounds|bucks))", "\0"),
    (rf"(?<![\w.]){_MONEY}\s?(?=[-+]?\.?\d)(?i:{_NOT_MILLIONS})", ""),
    (rf"(?<![A-Za-z])(?:{_SIGN}|{_MONEY}(?![A-Za-z]))(?i:{_NOT_MILLIONS})", " "),
]

_ABBREVIATIONS = [
    (r"\bi\.\s?e\.,?|\b[Bb]ecause\b", ": "),
    (r"\bNo\.\s+of\b", "Number of"),
    (r"<<([^<>]*=[^<>]*)>>(?=\d)", r" \1 = "),  # 9 * 2 = <<9*2=18>>18, as in the solutions of GSM8K
    (r"(?i)\((?:since|as)\s+(?=\S*\d)", "("),  # 18 (since 9 + 9 = 18)
    (r"\b[cC]\.\s*(?=\d)", "circa "),
    (r"\bU\.\s?S\.(?: ?A\.)?", "US"),
    (r"\b([ap])\.\s?m\.", r"\1m"),
    (r"\b(sq|cu|fl)\.\s?(?=[a-z])", r"\1 "),
    (r"\bleft[ -]over\b", "leftover"),
    (r"\b(Mr|Mrs|Ms|Dr|St|Jr|Sr)\.", r"\1"),
    (r"(?<=[A-Za-z])\((e?s)\)", r"\1"),  # egg(s)
    (r"(?i)\b(thousand|million|billion|trillion),(?=\s+\S+\s+hundred\b)", r"\1"),
]
_OPERATORS = [
    (r"(?i)\b(?:is |are )?equal(?:s|(?=\s+to\b))(?:\s+to)?\b", "="),
    (r"(?i)\bplus\b", " + "),
    (r"(?i)\bminus\b", " - "),
    (r"(?i)\b(?:times|multiplied by)\b|\s@(?=[\s\d])", " * "),
    (r"(?i)\bdivided by\b", " / "),
    (r"(?<=[\d)])\s*[xX]\s*(?=[\d(.])|(?<=\s)[xX]\s+(?=[\d(.])", " * "),
    (r"(?<=[\d)%])\s+(?:is|gives|makes)\s+(?=[-(]?\.?\d)", " = "),  # 9 * 2 is 18
    (r"^\s*(?:=+>|-+>|[\u2192\u21d2\u27f9])", ""),
]


def _compiled(*tables: list[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), replacement) for rules in tables for pattern, replacement in rules]


_FIRST = _compiled(_LATEX)
_NESTED = _compiled(_WRAPPERS)
_LAST = _compiled(_DELIMITERS, _CURRENCY, _ABBREVIATIONS, _OPERATORS)


def plain_text(text: str) -> str:
    """The same statement in plain text, as the module describes."""
    text = unicodedata.normalize("NFC", text).translate(_CHARACTERS)
    text = _OTHER_NUMERALS.sub(_ascii_numerals, text)
    text = _apply(_FIRST, text)
    before = None
    while before != text:  # from the innermost wrapper outwards
        before = text
        text = _apply(_NESTED, text)
    return _apply(_LAST, text)


def _apply(rules: list[tuple[re.Pattern[str], str]], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _ascii_numerals(match: re.Match[str]) -> str:
    digit, fraction, base, exponent = match.groups()
    if fraction:
        separator = " " if digit else ""
        return f"{digit}{separator}{unicodedata.normalize('NFKC', fraction)} ".replace("\u2044", "/")
    return f"{base}^{unicodedata.normalize('NFKC', exponent)}".replace("\u2212", "-")

"""Words around a number in an answer, and numbers that are written as words.

The lists are sorted by the effect that a word has on the value of the text. `grpo.rewards.number` uses them.
"""

import re
import unicodedata


def _words(text: str) -> frozenset[str]:
    return frozenset(_list(text))


def _list(text: str) -> list[str]:
    return text.split()


# A text with one of these words does not state its number as the answer, or states another one.
CHANGING = (
    # negation and error
    _words(
        """no not never neither nor none nothing nil non without except excluding excludes exclude excluded besides
        instead rather unlike cannot cant dont doesnt isnt arent wasnt werent wrong incorrect incorrectly false falsely
        untrue lies mistake mistaken mistakenly error erroneous impossible undefined unknown invalid unlikely disproved
        rejected ruled wrongly falsehood nope nah oops wait scratch else too aint hardly barely scarcely inaccurate
        inaccurately inexact imprecise flawed bogus fake fraudulent phony hoax nonsense typo bluff decoy distractor
        placeholder misread misreading miscalculated miscalculation miscounted blunder discard discards discarded
        discarding disregard disregards disregarded disregarding ignore ignores ignored ignoring eliminated retract
        retracts retracted withdrawn refute refutes refuted debunked disproves disprove contradict contradicts
        contradicted contradiction revoked rescinded overruled overturned superseded obsolete outdated irrelevant
        meaningless absurd implausible questionable unproven unverified subtotal subtotals preliminary provisional
        tentative naive bait redacted recheck recompute recalculate reconsider redo hmm sorry unclear inconsistent
        ambiguous suspicious disputed incorect falsch faux falso incorrecto"""
    )
    # doubt and condition
    | _words(
        """maybe perhaps possibly probably presumably likely may might could if unless whether doubt doubts doubtful
        probable suppose supposing supposedly assume assumed assuming guess guessing guessed seemingly unsure uncertain
        depends depending hypothetically think thinks believe believes suspect suspects hope apparently potentially
        allegedly reportedly arguably conceivably theoretically ideally confidence unconfirmed pending tbd idk dunno
        provided otherwise alternatively kinda sorta prolly appear appears appeared seem seems seemed vielleicht quizas
        forse"""
    )
    # approximation and rounding
    | _words(
        """approximation approximations approximate approximately approx approximates circa ca roughly nearly almost
        nearing approaching approaches estimate estimated estimates estimating estimation somewhat virtually practically
        rounded rounding truncated est ish thereabouts ballpark rough crude"""
    )
    # bounds, ranges and alternatives
    | _words(
        """or versus vs ranges ranging upward upwards onward onwards increasing decreasing upto atleast atmost exceed
        exceeds exceeded exceeding surpass surpasses surpassing beyond plusminus bound bounds limit cap cutoff threshold
        overestimate underestimate"""
    )
    # multiples and parts
    | _words(
        """twice thrice double doubled doubles doubling treble triple tripled triples tripling quadruple half halves
        halved halving semi quarter quarters quartered third thirds fourth fourths fraction fractions fractional
        numerator denominator multiplication division percentile lots multiples multiply multiplied multiplies
        multiplying multiplier divide divided divides dividing divisor divisors factor factors ratio ratios proportional
        inversely"""
    )
    # powers and functions
    | _words(
        """squared cubed root roots rooted radical sqrt cbrt power powers exponent exponents exponential exponentially
        exponentiated exponentiation tetration log logs logarithm logarithms logarithmic ln lg exp sin sine cos cosine
        tangent cotangent secant csc cosecant arcsin arccos arctan asin acos atan sinh cosh tanh sgn signum factorial
        factorials primorial subfactorial gamma choose chooses permute binomial mod modulo modulus absolute abs
        magnitude norm ceil ceiling floored integral integrate derivative derivation differentiate sigma determinant det
        gcd lcm hcf gcf nth successor predecessor prime primes fibonacci triangular composite infinity infinite pi tau
        phi theta euler nan inf invert inverted reversed reverse reversal backwards backward mirrored flipped swapped
        concatenated digit digits digital complement conjugate reciprocal reciprocals inverse inverses opposite
        opposites function"""
    )
    # sign
    | _words(
        """minus neg negative negatives negatively negated negate negation loss losses deficit deficits debt debts
        overdrawn overdraft underwater shortfall shortage bc bce"""
    )
    # scales that are not evaluated
    | _words(
        """lakh lakhs lacs lpa crore crores crs arab kharab wan oku myriad myriads mil mille bn mln mio mrd mlrd tn trn
        thou thous exa peta tera giga mega kilo hecto deca deka deci centi milli micro nano pico googol zillion
        gazillion jillion umpteen hundreds thousands millions billions trillions dozens basis bps bp permille permil ppm
        ppb"""
    )
    # other bases, and repeating digits
    | _words(
        """zeros zeroes base binary octal hex hexadecimal decimal decimals duodecimal ternary recurring repeating
        repeated repeats nonary"""
    )
    # the same in the languages that are most often mixed in
    | _words(
        """menos moins meno nicht kein keine niet pas ni ou oder oppure mas fois mal veces vezes volte tausend millionen
        milliarde milliarden millones millon milhao milhoes miljoen mila doble doppelt doppio dobro moitie halb halbe
        nein errado equivocado fout talvez misschien mehr weniger mindestens hochstens quadrat carre dobles demi mitad
        metade ungefaehr environ circa casi quasi etwa"""
    )
)
_CHANGING_FORM = re.compile(
    r"""
      app?r?ox.* | (?:wo|would|should|could|did|must|need|ca|do|does|is|are|was|were|has|have|had|ai)nt
    | th?ou?s[a-z]*nds? | hund[a-z]*d?s | hundered | ts?d | tys | tusen | duizend | ribu | juta | grands
    | (?:hunde?rd?|thsd|thd|thousd) | megabucks | sq?rd | dbl | trpl | prob | probly | mebbe
    | (?:kilo(?!s?$|gram|met|watt|byte|jou|cal|lit)[a-z]*)
    | .*(?:(?<!co)uple[ds]?|upling|fold|illiards?|squaring|cubing|(?<!f)ish|n't)
    | .*illion(?:th)?s? | googol.* | nths?
    | (?:two|three|four|five|six|seven|eight|nine|ten|twelve|(?:twen|thir|for|fif|six|seven|eigh|nine)tie)e?s
    | (?:fif|six|seven|eigh|nin|ten|eleven|twelf|(?:thir|four|fif|six|seven|eigh|nine)teen
        |(?:twen|thir|for|fif|six|seven|eigh|nine)tie|hundred|thousand)ths?
    """,
    re.VERBOSE,
)
_ENDS_IN_ISH = _words("finish dish polish radish english british spanish irish danish")

CHANGING_PHRASE = re.compile(
    r"""\b(?:
        (?:is|are|was|were|be)[ ](?:more|less|fewer|greater|bigger|larger|smaller|higher|lower|close|near|between)
      | (?:more|less|fewer|greater|bigger|larger|smaller|higher|lower)[ ]than
        [ ](?:(?:the|a|its)[ ])?(?:answer|result|total|sum|number|amount|value|correct|it|this|that|what|a|an)
      | (?:the|a|its|their)[ ](?:square|cube)[ ](?:of|is|and)
      | at[ ](?:the[ ])?(?:very[ ])?(?:least|most|best|worst|outside|latest|earliest)
      | far[ ]from | left[ ]out | (?:another|other|different)[ ](?:question|problem) | old[ ](?:value|answer|number)
      | (?:a|the|this)[ ](?:lie|trap|trick|joke|red[ ]herring) | is[ ]out | seems[ ]off | hold[ ]on | let[ ]me
      | round(?:ed)?[ ]up | in[ ]round[ ]numbers | nearest[ ]whole | to[ ]the[ ]nearest | to[ ]be[ ]confirmed
      | subject[ ]to | for[ ]now | in[ ]theory | as[ ]long[ ]as | (?:best|worst)[ ]case | best[ ](?:shot|attempt|guess)
      | (?:will|would|should|can|is|was|are|does|did)[ ](?:it|she|he|they|we|you|i)
      | (?:baker's|long|dozen)[ ]dozen | (?:great|small)[ ]gross | long[ ]hundred
      | in[ ](?:the[ ]red|arrears) | crossed[ ]out | sign[ ](?:is[ ])?(?:changed|flipped|switched|reversed)
      | used[ ]to[ ]be | no[ ]longer
      | (?:added|subtracted|deducted)[ ](?:to|from) | more[ ](?:or|and) | give[ ]or[ ]take
      | (?:capped|limited|starting|starts|started|begins|beginning)[ ](?:at|from|to|with)
      | less[ ](?:the|a|an|any|tax|taxes|tip|fees)
    )\b""",
    re.VERBOSE,
)
# Directly in front of a number, also with punctuation between.
CHANGING_PREVIOUS = _words(
    """over under above below about around near close between minimum maximum minimal maximal limit more less fewer
    greater of to by than and but plus times"""
)
# In front of a number, with other words between or not.
CHANGING_BEFORE = _words("than least most min max ceiling floor square cube")
# After a number, with other words between or not.
CHANGING_AFTER = _words(
    """maximum minimum max tops short hole subtracted but however though although intermediate partial incomplete etc
    etcetera typically usually sometimes hopefully nvm afaik iirc imo sic draft dummy outlier excl sans"""
)
# In front of "a total of 18", and at the beginning of a label
BOUNDS = _words("over under above below about around near close past within beyond outside")
# After a comma these words may begin a clause that leaves the number as it is.
BEGINS_CLAUSE = _words("to by of and more less fewer")
# Directly after a number these words change it, or continue it.
CHANGING_NEXT = _words(
    """and plus minus times time to into by over under above below off through past short shy up down point odd some
    something cube remainder rem div sub quad alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi rho
    omega psi chi fails failed about around close near subtract add deduct cancelled canceled removed deleted void then
    range voided crossed struck omitted increased reduced decreased incremented decremented scaled adjusted compounded
    discounted taxed averaged split shared distributed gross grand mill mills bil bill lac thou score pie ex et y und og
    och i hoch au aux"""
)
# "18 (and up)", "18 (over)"
NOT_IN_A_REMARK = (CHANGING_PREVIOUS | CHANGING_NEXT) - _words("to by of more less fewer time point")
# "18 and more", "18 dollars and change"
MORE = _words(
    """a an any another some change more other others many extra so older counting several few bit up above over below
    under beyond then"""
)

# After a number on its own these words say something of it, which must begin with one of CONFIRMS or DETERMINERS:
# "18 is the answer" and "18 must be right", but not "18 is dropped".
SAYS_OF = _words(
    """is are was were be been being looks look looked sounds remains stays turns turned proves proved will would must
    shall should has have had"""
)
CONFIRMS = _words(
    "right true what how left needed required enough due available per confirmed verified spent made used paid"
)
DETERMINERS = _words("the a an his her its their our my your that this these those each all another")

# Passed over between a number and the word in front of it.
TRANSPARENT = _words(
    """the a an his her its their our my your these those this that all only just exactly precisely simply total another
    additional extra remaining full whole exact final correct combined same altogether overall together still also
    already now finally currently actually each me us him them you it there here indeed clearly"""
)
# One of these words, a verb, or punctuation may stand in front of a number. Any other word may be a function.
BEFORE = _words(
    """is are was were be been being am that's it's there's here's he's she's equals equal answer answers result results
    total totals sum sums value cost costs price profit so thus therefore hence then ie namely for in at with we i they
    he she"""
)
_VERBS = _words(
    """accept accommodate achieve acquire adopt apply ask assemble attend average award bake ball bark become bike bill
    block boil borrow bring build burn buy carry catch charge chew chop clean climb collect complete consume contain
    contribute cook cost count cover crack create crochet cut dance decorate deliver deposit dig distribute donate
    download drink drive drop dry earn eat employ encounter enter examine expect experience feed fill find finish fit
    fix fly fold gain gather get give go grab grade groom grow guarantee harvest hatch have heal hear help hike hire hit
    hold hug hunt install invest invite iron jog jump keep kick kill knit knock know lack last lay learn leave lend lift
    light live load lock lose mail make manage manufacture mean measure melt memorize mend milk mix mount mow need
    observe obtain occupy offer open order owe own pack paddle paint park pass pay pedal peel perform pick pitch place
    plant play plow polish pop pour practice prepare print process produce provide pull pump purchase push put raise
    rake reach read receive record recycle register release remain remember rent repair represent require return ride
    ring roast row rub run sail save scoop score scrub seal seat see select sell send separate serve sew sharpen ship
    shoot shovel shuck sign sing sit skate skip sleep slice slide smoke solve sort spend splash spot spread squeeze
    stack stamp stand stay steal stitch stock store stretch study supply sustain sweep swim swing take teach throw tie
    toss total tour track trade train transfer transport travel treat trim type unload use visit vote wait walk want
    wash watch wax wear weed weigh whip win wind work wrap write yield"""
)
_PAST_FORMS = _words(
    """ate beat beats became bore bought broke broken brought built burnt caught dealt did do does done drank driven
    drove dug eaten fed fell felt flew flown fought found froze gave given got gotten grew grown had has heard held hid
    hung kept knew laid led left lent lit lost made meant met paid ran rang read ridden risen rode rose rung said sang
    sank sat saw seen sent sewn shone shook shot shown slept slid sold spent sprang spread stole stood sunk swam swept
    swum swung taken taught thought threw thrown told took tore torn went woke won wore worn wound written wrote"""
)
# "a total of 18", but not "the square of 18"
BEFORE_OF = _words(
    """total totals sum profit cost costs price amount average mean median speed rate distance length width height depth
    weight mass area volume perimeter age time duration discount tip change value balance salary payment pay wage fee
    fine bonus capacity increase tax bill consists consist answer result count savings income revenue earnings
    temperature population budget charge"""
)
# "comes to 18", "adds up to 18", but not "up to 18"
BEFORE_TO = _words(
    """come comes came coming amount amounts amounted sums summed equal equates equivalent total totals totaled totalled
    simplifies simplify evaluates evaluate works translates corresponds"""
)
BEFORE_UP_TO = _words("add adds added adding sum sums summed summing")

# "Total for 3 days = 18 eggs": the words around the number are a name.
PERIODS = _words("minute minutes hour hours day days week weeks month months year years")
BEFORE_A_TIME = _words("in after over for within during")
BEFORE_A_PERIOD = _words("total sum cost price amount number for in after every each per the of")

# What is called one of these is no step of a calculation.
ANSWER = _words("answer answers result final")
# They connect a clause with the one before, and end a statement.
CONNECTIVES = _words("so since as therefore thus hence which then")
CLOSING = _list("i hope it is correct")
NOT_A_DENOMINATOR = _words("people number total answer")

UNITS = _words(
    """m g s h l c f cm mm km kg mg ml dl cl kl lb oz ft mi yd in hr pm am mph kph kmh lbs hrs min mins sec secs yds pt
    pts qt qts gal gals tsp tbsp sq pcs pc gb mb tb kb kw kwh kj cal kcal cc px fl doz ppl st nd rd th us eur usd gbp"""
)
ORDINAL_ENDINGS = _words("st nd rd th")
SHORT = _words("a an as at be do go he hi if in is it me my of on pm am she so us we i eg ie ok")
# "an 18-inch ribbon", but not "18-x" or "18-tax"
AFTER_HYPHEN = _words(
    """year years day days hour hours minute minutes second seconds week weeks month months inch inches foot feet mile
    miles yard yards pound pounds ounce ounces gallon gallons dollar dollars cent cents percent page pages piece pieces
    point person people member meter meters kilometer centimeter liter gram kilogram degree pack"""
)

# "18 cm^2", but not "18 eggs^2"
WITH_POWERS = UNITS | _words(
    """inch inches foot feet yard yards mile miles meter meters metre metres centimeter centimeters centimetres
    kilometer kilometers kilometres millimeter millimeters millimetres second seconds unit units"""
)

_BELOW_20 = _list(
    """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen"""
)
_TENS = _list("twenty thirty forty fifty sixty seventy eighty ninety")
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_VALUES = {
    **{word: value for value, word in enumerate(_BELOW_20)},
    **{word: 10 * value for value, word in enumerate(_TENS, start=2)},
}
NUMBER_WORDS = frozenset([*_VALUES, "hundred", *SCALES])


def changes_value(word: str) -> bool:
    """Whether a word in lower case, or a piece of it between hyphens, changes the value of a number near it."""
    pieces = [piece.removesuffix("'s") for piece in _without_accents(word).split("-")]
    return any(
        piece.replace("'", "") in CHANGING
        or piece in NUMBER_WORDS
        or (piece not in _ENDS_IN_ISH and _CHANGING_FORM.fullmatch(piece))
        for piece in pieces
    )


def _without_accents(word: str) -> str:
    return "".join(each for each in unicodedata.normalize("NFKD", word) if not unicodedata.combining(each))


def is_verb(word: str) -> bool:
    """Whether a word in lower case is a form of a common verb that can stand in front of a number."""
    candidates = {word, re.sub(r"(?:ies|ied)$", "y", word), re.sub(r"e?s$", "", word), word.removesuffix("s")}
    stem = re.sub(r"(?:ed|ing)$", "", word)
    if stem != word:
        candidates |= {stem, stem + "e", re.sub(r"([bdglmnprt])\1$", r"\1", stem)}
    return word in _PAST_FORMS or bool(candidates & _VERBS)


def spell(value: int) -> list[str]:
    """The English words of an integer from 0 to below 10**15, without "and" and hyphens."""
    if value < 20:
        return [_BELOW_20[value]]
    if value < 100:
        rest = [_BELOW_20[value % 10]] if value % 10 else []
        return [_TENS[value // 10 - 2], *rest]
    name, unit = max(((name, unit) for name, unit in [("hundred", 100), *SCALES.items()] if unit <= value), key=_unit)
    rest = spell(value % unit) if value % unit else []
    return [*spell(value // unit), name, *rest]


def _unit(scale: tuple[str, int]) -> int:
    return scale[1]


def spelled_number(words: list[str]) -> int | None:
    """The value of an integer in English words, such as one hundred (and) five; None unless it is well formed."""
    words = [word for word in words if word != "and"]
    if words[:1] == ["a"]:
        words = ["one", *words[1:]]
    total = 0
    group = 0
    for word in words:
        if word == "hundred":
            group *= 100
        elif word in SCALES:
            total += group * SCALES[word]
            group = 0
        else:
            group += _VALUES[word]
    value = total + group
    # "twenty eighteen" and "five hundred thousand million" add up to something as well, but are not numbers.
    return value if value < 10**15 and spell(value) == words else None

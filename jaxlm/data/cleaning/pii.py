"""Personal data: what can be told by its form is replaced by its kind, "[EMAIL]". Names and addresses cannot be."""

import ipaddress
import re

from jaxlm.data.cleaning.step import STEPS
from jaxlm.errors import UserError
from jaxlm.registry import did_you_mean

EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.)+[A-Za-z]{2,24}(?![\w-])")
# Groups of digits between which one blank, dot or hyphen may stand, perhaps with + and brackets.
PHONE = re.compile(r"(?<![\w.+-])(?:"
                   r"\+\d{1,3}[ .-]?(?:\(0?\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}"  # international
                   r"|(?:1[ .-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[ .-])[2-9]\d{2}[ .-]\d{4}"  # North American
                   r"|1[3-9]\d[ -]?\d{4}[ -]?\d{4}"  # Chinese mobile
                   r"|0\d{2,3}-[1-9]\d{6,7}"  # Chinese landline
                   r")(?![\w-]|\.\d)")
CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-]|\.\d)")
SSN = re.compile(r"(?<![\w.-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-]|\.\d)")  # of the United States
RESIDENT = re.compile(r"(?<!\d)[1-9]\d{5}(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\d)")  # of China
IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
IP = re.compile(r"(?<![\w.:-])(?:\d{1,3}(?:\.\d{1,3}){3}|(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4})(?![\w:-]|\.\d)")


def luhn(number: str) -> bool:
    """The check digit of payment cards (ISO/IEC 7812-1)."""
    digits = [int(c) for c in number if c.isdigit()][::-1]
    doubled = [d if i % 2 == 0 else 2 * d - 9 * (d > 4) for i, d in enumerate(digits)]
    return len(set(digits)) > 1 and sum(doubled) % 10 == 0


def resident(number: str) -> bool:
    """The check digit of the Chinese resident number (GB 11643-1999, ISO 7064 MOD 11-2)."""
    weighted = sum(int(digit) * (2 ** (17 - i) % 11) for i, digit in enumerate(number[:17]))
    return number[17].upper() == "10X98765432"[weighted % 11]


def iban(number: str) -> bool:
    """The check digits of an account number (ISO 13616)."""
    compact = number.replace(" ", "")
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def public_ip(address: str) -> bool:
    """Those of private networks, of the machine itself and of documentation name nobody."""
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


# In this order: a number that passes the stricter check is not left to the looser one.
KINDS = {"email": (EMAIL, lambda text: True), "id": (RESIDENT, resident), "ssn": (SSN, lambda text: True), "iban": (IBAN, iban),
         "card": (CARD, luhn), "ip": (IP, public_ip), "phone": (PHONE, lambda text: sum(map(str.isdigit, text)) >= 7)}


@STEPS.register("pii")
def build(options, context):
    """Masks the `kinds`; how many of each is counted."""
    if wrong := [kind for kind in options.kinds if kind not in KINDS]:
        raise UserError(*(f"prepare.pii.kinds: {kind!r}: {did_you_mean(kind, KINDS)}" for kind in wrong))
    kinds = {kind: KINDS[kind] for kind in KINDS if kind in options.kinds}

    def step(record):
        text = record.text
        for kind, (pattern, valid) in kinds.items():
            def mask(match, kind=kind, valid=valid):
                if not valid(match[0]):
                    return match[0]
                context.counts[kind] += 1
                return f"[{kind.upper()}]"
            text = pattern.sub(mask, text)
        if text == record.text:
            return record
        context.counts["changed"] += 1
        return record._replace(text=text)

    return step

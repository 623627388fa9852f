"""The ledger as a dict of balances and a dict of holds, and a machine that compares the real one with it.

What a request is refused with is part of the model. A few amounts fill the cap, so that limits are met often.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from budgets import audit
from budgets.ledger import (
    BUDGET,
    IDLE,
    OVERRUN,
    RESERVE,
    WORLD,
    BudgetExhausted,
    BudgetFrozen,
    CapTooLow,
    HoldClosed,
    HoldsOpen,
    IdempotencyConflict,
    Ledger,
)
from budgets.money import split_micros
from sweep.store import Store

CAP = 1000
AMOUNTS = st.integers(1, 400)
COSTS = ("trial:0", "trial:1", IDLE, "overhead:load")
CHARGES = st.dictionaries(st.sampled_from(COSTS), st.integers(1, 200), max_size=3)
ANY = st.integers(0, 10**6)  # which of some, by its remainder
FENCED = ("hold", "extend", "settle", "void", "expire")
STUDIES = itertools.count()


class Model:
    """Whose money is where."""

    def __init__(self) -> None:
        self.balances: Counter[str] = Counter({WORLD: -CAP, BUDGET: CAP})
        self.holds: dict[str, tuple[str, int]] = {}  # open ones: account and amount
        self.refundable: dict[str, tuple[str, str, int]] = {}  # charges by id: whence, whither, how much

    def move(self, debit: str, credit: str, amount: int) -> None:
        """One transfer."""
        self.balances[debit] -= amount
        self.balances[credit] += amount

    def free(self, code: str) -> int:
        """What an account has beyond its open holds."""
        return self.balances[code] - sum(amount for account, amount in self.holds.values() if account == code)

    @property
    def cap(self) -> int:
        """What the world gave, but for what was lost to it."""
        return -self.balances[WORLD] - self.balances[OVERRUN]

    @property
    def frozen(self) -> bool:
        """Whether something was lost."""
        return self.balances[OVERRUN] > 0

    @property
    def costs(self) -> dict[str, int]:
        """What every cost centre was charged."""
        return {c: b for c, b in self.balances.items() if c not in (WORLD, BUDGET, RESERVE, OVERRUN) and b > 0}

    def pay(self, name: str, source: str, charges: Mapping[str, int]) -> None:
        """Charges by cost centre; for the budget the reserve stands in. What is missing is lost, largest first."""
        missing = sum(charges.values()) - self.free(source)
        if source == BUDGET and missing > 0:
            from_reserve = min(missing, self.free(RESERVE))
            self.move(RESERVE, BUDGET, from_reserve)
            missing -= from_reserve
        lost = max(missing, 0)
        if lost:
            self.move(WORLD, OVERRUN, lost)
        for code, charge in sorted(charges.items(), key=lambda item: (-item[1], item[0])):
            paid = charge - min(lost, charge)
            lost -= charge - paid
            if paid:
                self.move(source, code, paid)
                self.refundable[name.format(code)] = (source, code, paid)


class Books(RuleBasedStateMachine):
    """Every rule asks the model what must happen, then asks the ledger for it in a transaction of its own."""

    store: ClassVar[Store]
    ledger_class: ClassVar[type[Ledger]] = Ledger

    def __init__(self) -> None:
        super().__init__()
        self.study = f"study{next(STUDIES)}"
        self.model = Model()
        self.fence = 1
        self.names = itertools.count()
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []  # those that may be repeated
        with self.store.write() as connection:
            self.ledger_class(connection, self.study).open(CAP)

    def name(self) -> str:
        """An id that nobody used."""
        return f"{self.study}:{next(self.names)}"

    def some_hold(self, which: int) -> str:
        """One of the open holds, or a new one where there is none."""
        if not self.model.holds:
            self.hold(min(self.model.free(BUDGET), 300) or 1, BUDGET)
            assume(self.model.holds)
        return sorted(self.model.holds)[which % len(self.model.holds)]

    def call(self, refused: Any, verb: str, *args: Any, **words: Any) -> Any:
        """Calls a verb, which must raise `refused`, or must not raise if that is None."""
        if verb in FENCED:
            words = {"fence": self.fence} | words
        with contextlib.ExitStack() as stack:
            if refused is not None:
                stack.enter_context(contextlib.suppress(refused))
            with self.store.write() as connection:
                result = getattr(self.ledger_class(connection, self.study), verb)(*args, **words)
            assert refused is None, f"{verb}{args} should have been refused with {refused}"
            return result
        return None

    def remember(self, verb: str, *args: Any, **words: Any) -> None:
        """Notes a call that was carried out, and repeats it at once; `repeat` does so later."""
        self.calls.append((verb, args, words))
        self.repeat_call(-1)

    def repeat_call(self, which: int) -> None:
        """Calls once more what was carried out before, with the same id: the model knows of no effect."""
        verb, args, words = self.calls[which]
        result = self.call(None, verb, *args, **words)
        assert result in (None, 0), f"{verb}{args} did something again: {result}"

    def cannot_hold(self, code: str, amount: int) -> type[Exception] | None:
        """What refuses a hold of that size."""
        return BudgetFrozen if self.model.frozen else BudgetExhausted if amount > self.model.free(code) else None

    @rule(amount=AMOUNTS, code=st.sampled_from((BUDGET, BUDGET, RESERVE)))
    def hold(self, amount: int, code: str) -> None:
        """Sets money aside."""
        call = ("hold", self.name(), amount)
        words = {"purpose": "slice", "account_code": code}
        refused = self.cannot_hold(code, amount)
        self.call(refused, *call, **words)
        if refused is None:
            self.model.holds[call[1]] = (code, amount)
            self.remember(*call, **words)

    @rule(which=ANY, amount=AMOUNTS)
    def extend(self, which: int, amount: int) -> None:
        """Widens a hold; a narrower target changes nothing."""
        name = self.some_hold(which)
        code, held = self.model.holds[name]
        refused = self.cannot_hold(code, amount - held) if amount > held else None
        self.call(refused, "extend", name, amount)
        if refused is None:
            self.model.holds[name] = (code, max(amount, held))

    @rule(which=ANY, charges=CHARGES)
    def settle(self, which: int, charges: dict[str, int]) -> None:
        """Charges a hold, perhaps for more than it held."""
        name = self.some_hold(which)
        self.call(None, "settle", name, charges)
        code, _ = self.model.holds.pop(name)
        self.model.pay(f"settle:{name}:{{}}", code, charges)
        self.remember("settle", name, charges)

    @rule(which=ANY)
    def void(self, which: int) -> None:
        """Returns a hold."""
        name = self.some_hold(which)
        self.call(None, "void", name)
        del self.model.holds[name]
        self.remember("void", name)

    @rule(which=ANY, weights=CHARGES.filter(bool))
    def expire(self, which: int, weights: dict[str, int]) -> None:
        """Charges a hold in full."""
        name = self.some_hold(which)
        self.call(None, "expire", name, weights)
        code, amount = self.model.holds.pop(name)
        self.model.pay(f"expire:{name}:{{}}", code, split_micros(amount, weights))
        self.remember("expire", name, weights)

    @rule(which=ANY, part=st.integers(1, 100))
    def refund(self, which: int, part: int) -> None:
        """Returns part of a charge. What a lower bill returned of the same centre before is left alone."""
        if not self.model.refundable:
            self.charge(IDLE, 50)
            assume(self.model.refundable)
        name = sorted(self.model.refundable)[which % len(self.model.refundable)]
        debit, credit, charged = self.model.refundable[name]
        self.call(ValueError, "refund", name, charged + 1, note="too much")
        amount = min(max(charged * part // 100, 1), self.model.balances[credit])
        if amount:
            self.call(None, "refund", name, amount, note="evidence")
            self.model.move(credit, debit, amount)
            del self.model.refundable[name]
            self.remember("refund", name, amount, note="evidence")

    @rule(cap=st.integers(1, 1500))
    def set_cap(self, cap: int) -> None:
        """Moves the cap, never under what is promised."""
        change, name = cap - self.model.cap, self.name()
        refused = CapTooLow if self.model.free(BUDGET) < -change else None
        self.call(refused, "set_cap", cap, name)
        if refused is None and change:  # what changed nothing leaves no trace, and is a new request when repeated
            self.model.move(WORLD, BUDGET, change)
            self.remember("set_cap", cap, name)

    @rule(amount=AMOUNTS)
    def set_aside(self, amount: int) -> None:
        """Moves money to the reserve."""
        name = self.name()
        refused = BudgetExhausted if amount > self.model.free(BUDGET) else None
        self.call(refused, "set_aside", amount, name)
        if refused is None:
            self.model.move(BUDGET, RESERVE, amount)
            self.remember("set_aside", amount, name)

    @precondition(lambda self: self.model.balances[RESERVE])
    @rule()
    def release(self) -> None:
        """Moves what is free of the reserve back."""
        free, name = self.model.free(RESERVE), self.name()
        assert self.call(None, "release", name, note="") == free
        if free:
            self.model.move(RESERVE, BUDGET, free)
            self.remember("release", name, note="")

    @rule(code=st.sampled_from(COSTS), amount=AMOUNTS)
    def charge(self, code: str, amount: int) -> None:
        """Charges what no hold covered."""
        name = self.name()
        self.call(None, "charge", name, code, amount, note="")
        self.model.pay(f"charge:{name}", BUDGET, {code: amount})
        self.remember("charge", name, code, amount, note="")

    @rule(difference=st.integers(-300, 300))
    def reconcile(self, difference: int) -> None:
        """Makes the books say what the bill says, once; not while money is held."""
        costs, lost = self.model.costs, self.model.balances[OVERRUN]
        bill = max(sum(costs.values()) + lost + difference, 0)
        difference = bill - sum(costs.values()) - lost
        if self.model.holds:
            self.call(HoldsOpen, "reconcile", bill, note="")
            return
        found = self.call(None, "reconcile", bill, note=""), self.call(None, "reconcile", bill, note="")
        assert found == (difference, 0), f"the bill differs by {found}, should by {difference} and then by nothing"
        if difference > 0:
            self.model.pay("", BUDGET, {"overhead:bill": difference})
            self.model.refundable.pop("", None)  # its id is the ledger's own
        elif difference < 0:
            found = min(-difference, lost)
            self.model.move(OVERRUN, WORLD, found)
            billed = min(-difference - found, costs.get("overhead:bill", 0))
            self.model.move("overhead:bill", BUDGET, billed)
            others = {code: cost for code, cost in costs.items() if code != "overhead:bill"}
            for code, part in split_micros(-difference - found - billed, others).items():
                self.model.move(code, BUDGET, part)

    @rule(which=ANY)
    def take_over(self, which: int) -> None:
        """Makes the holds another's; their former owner is refused from then on, whatever it wants."""
        self.fence += 1
        self.call(None, "take_over", self.fence)
        stale, name = self.fence - 1, self.some_hold(which)
        self.call(HoldClosed, "settle", name, {IDLE: 1}, fence=stale)
        self.call(HoldClosed, "extend", name, 2000, fence=stale)
        self.call(HoldClosed, "void", name, fence=stale)
        self.call(HoldClosed, "expire", name, {IDLE: 1}, fence=stale)

    @precondition(lambda self: self.calls)
    @rule(which=ANY)
    def repeat(self, which: int) -> None:
        """Repeats a call after whatever happened since."""
        self.repeat_call(which % len(self.calls))

    @precondition(lambda self: self.calls)
    @rule(which=ANY)
    def contradict(self, which: int) -> None:
        """Uses an id once more for something else: refused, without effect."""
        verb, args, words = self.calls[which % len(self.calls)]
        if verb in ("settle", "void", "expire"):
            self.call(HoldClosed, "settle", args[0], {"trial:9": 1}, **words)
            self.call(HoldClosed, "expire", args[0], {"trial:9": 1}, **words)
            self.call(HoldClosed, "extend", args[0], 2000, **words)
            if verb != "void":
                self.call(HoldClosed, "void", args[0], **words)
        elif verb in ("set_cap", "set_aside"):
            self.call(IdempotencyConflict, verb, args[0] + 1, *args[1:], **words)
        elif verb in ("hold", "charge"):
            self.call(IdempotencyConflict, verb, *args[:-1], args[-1] + 1, **words)
        elif verb == "refund":
            self.call((IdempotencyConflict, ValueError), verb, args[0], args[1] + 1, **words)

    @invariant()
    def agree(self) -> None:
        """The audit is clean, and the ledger says what the model says."""
        with self.store.read() as connection:
            violations = audit.violations(connection, self.study)
            ledger = self.ledger_class(connection, self.study)
            found, holds = ledger.balances(), ledger.open_holds()
        assert not violations, f"the audit found {violations}"
        accounts = {code: balance for code, balance in found.accounts.items() if balance}
        expected = {code: balance for code, balance in self.model.balances.items() if balance}
        assert accounts == expected, f"the balances are {accounts}, should be {expected}"
        open_holds = {name: amount for name, (_, amount) in self.model.holds.items()}
        assert holds == open_holds, f"the open holds are {holds}, should be {open_holds}"
        sums = (found.cap, found.spent, found.held, found.left, found.frozen)
        left = self.model.free(BUDGET) + self.model.free(RESERVE)
        whole = (self.model.cap, sum(self.model.costs.values()), sum(holds.values()), left, self.model.frozen)
        assert sums == whole, f"the sums are {sums}, should be {whole}"
        assert found.spent + found.held <= found.cap, f"the cap is passed: {sums}"

"""Results of a search as a web page: verdict, front and finalists, and the staircase of the device."""

from evit_deploy.charts.kinds import Axes, Point, lines
from evit_deploy.environment.command import commands
from evit_deploy.pages.page import WebPage
from evit_deploy.tuning.results.front import Tuning, front_chart
from evit_deploy.tuning.results.tables import table


def as_page(found: Tuning) -> str:
    """Formats the results of a search as a complete HTML page.

    Args:
        found: The results.
    """
    page = WebPage(f"Tuning: {found.budget}", f"{found.staircase.runtime}, batch {found.staircase.batch}")
    page.section("Verdict")
    page.cards((("Was the budget met?", found.verdict, "good" if found.met else "bad"),))
    page.facts(
        [("Schedules tried on images", str(found.looked_at)), ("Images of the finalists", str(found.images)),
         ("Chosen", found.winner)]
    )  # fmt: skip
    page.section("Front and finalists")
    page.charts((("Nearness to the dense model against time", front_chart(found)),))
    page.table(*table(found))
    page.section("The device's staircase")
    stairs = found.staircase
    values = [
        Point(count, 1e3 * one, f"{count} tokens: {1e3 * one:.4g} ms [{1e3 * low:.4g}, {1e3 * high:.4g}]", "block",
              1e3 * low, 1e3 * high)
        for count, one, low, high in zip(stairs.counts, stairs.block, stairs.low, stairs.high, strict=True)
    ]  # fmt: skip
    axes = Axes("tokens", "milliseconds a block")
    page.charts((("Time of one block by its tokens, with 95 % intervals", lines(values, axes, "Time by tokens")),))
    page.section("Environment and commands")
    page.facts([(name, str(value)) for name, value in (found.device | found.versions).items()])
    typed = commands()
    if typed:
        page.commands(typed)
    for note in found.notes:
        page.line(note)
    return str(page)

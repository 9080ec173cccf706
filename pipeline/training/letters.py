"""Letters and signs as a pen draws them: the strokes of each, and of each with serifs.

Left out are those that a digit looks like in many a hand: b g I l O o q S s Z z.
"""

import re

STROKES = 12  # of one letter at most
SIDE = 10  # of the grid that letters lie on: x to the right, y down
TOP, BOTTOM = 0, 8  # where serifs may be
SERIF = 1.2  # from its middle to its end
# A point is two figures, x and y. A line leads to the next after "-", a curve after "(", which
# bends towards the point in brackets. Blanks lift the pen.
WAYS = (
    *("08-30-68 15-55", "08-30-68 16-56", "00-08 00-30(60)62(64)34-04 34(64)66(68)38-08"),  # A A B
    *("62(60)40(00)04(08)48(68)66", "00-08 00-20(60)64(68)28-08"),  # C D
    *("60-00-08-68 04-54", "60-00-08 04-54"),  # E F
    *("62(60)40(00)04(08)38(68)64-34", "62(60)40(00)04(08)38(68)65 35-65-68"),  # G
    *("00-08 60-68 04-64", "50-56(58)38(18)16", "20-60 40-46(48)28(08)06"),  # H J
    *("00-08 60-04-68", "00-08-58", "08-00-36-60-68", "08-10-36-50-68"),  # K L M
    *("08-00-68-60", "00-08 00-30(60)62(64)34-04"),  # N P
    *("30(60)64(68)38(08)04(00)30 46-79", "00-08 00-30(60)62(64)34-04 34-68"),  # Q R
    *("00-60 30-38", "00-05(08)38(68)65-60", "00-38-60", "00-28-42-68-80"),  # T U V W
    *("00-68 60-08", "00-34-60 34-38"),  # X Y
    *("11(10)30(60)63-68 64-34(04)06(08)28(58)65", "50-58 52(50)30(00)04(08)38(58)56"),  # a a
    "12(10)30(50)53-56(58)78 53-34(04)06(08)28(48)55",  # a
    *("62(60)30(00)04(08)38(68)66", "60-68 65(63)33(03)05(08)38(68)66"),  # c d
    *("04-64(60)30(00)04(08)38(58)67", "60(20)23-28 03-53"),  # e f
    *("00-08 06(03)33(63)65-68", "33-38 30-31", "43-46(48)28(18)17 40-41"),  # h i j
    *("00-08 53-05-58", "03-08 05(03)23(43)45-48 45(43)63(83)85-88"),  # k m
    *("00-08 03(00)30(60)63-68", "00-08 02(00)30(60)62(65)35(05)03"),  # n p
    *("00-08 04(00)40(50)51", "20-26(28)48(58)57 02-52", "30-38 02-62"),  # r t
    *("00-05(08)28(58)55 50-58", "00-34 60-08", "20-26(28)08"),  # u y J
    # Signs and small drawings, which nobody reads for a digit either.
    *("04-64 31-37", "03-63 05-65", "20-28 40-48 03-63 05-65"),  # + = #
    *("02(00)30(60)62(63)44(34)35 38-38", "68-12(10)30(50)42-15(08)28(58)64"),  # ? &
    "01(00)10(20)21(22)12(02)01 60-08 47(46)56(66)67(68)58(48)47",  # %
    *("05-28-80", "04-84 62-84-66", "30-68-08-30", "04-30-64-68-08-04"),  # tick arrow hut house
    "32(30)10(00)02(04)38(64)62(60)50(30)32",  # heart
    "04(00)40(80)84(88)48(08)04 22-23 62-63 25(47)65",  # face
)
Point = tuple[float, float]
Stroke = tuple[Point, Point, Point]  # where it begins, what it bends towards, where it ends


def ways() -> list[list[Stroke]]:
    """The STROKES of each way to write a letter, then of each with serifs, from 0 to 9.

    Where a letter has fewer, the rest of them are a point of it.
    """
    plain = [_strokes(way) for way in WAYS]
    return [_filled(way) for way in (*plain, *map(_with_serifs, plain))]


def _strokes(way: str) -> list[Stroke]:
    strokes: list[Stroke] = []
    for path in way.split():
        begin = _point(path[:2])
        for bend, end in re.findall(r"(?:-|\((\d\d)\))(\d\d)", path[2:]):
            last = _point(end)
            halfway = ((begin[0] + last[0]) / 2, (begin[1] + last[1]) / 2)
            strokes.append((begin, _point(bend) if bend else halfway, last))
            begin = last
    return strokes


def _point(figures: str) -> Point:
    return float(figures[0]), float(figures[1])


def _with_serifs(strokes: list[Stroke]) -> list[Stroke]:
    """The strokes, and a dash across each place at the top or the bottom where just one ends."""
    ends = [point for stroke in strokes for point in (stroke[0], stroke[2])]
    serifs = [
        ((x - SERIF, y), (x, y), (x + SERIF, y))
        for x, y in dict.fromkeys(ends)
        if y in (TOP, BOTTOM) and ends.count((x, y)) == 1
    ]
    return [*strokes, *serifs]


def _filled(strokes: list[Stroke]) -> list[Stroke]:
    first = strokes[0][0]
    assert len(strokes) <= STROKES
    return [*strokes, *[(first, first, first)] * (STROKES - len(strokes))]

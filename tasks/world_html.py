"""HTML around a page's main text: layouts of different sites, with all that is not the main text."""

import random
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Labels:
    """Words of a site's frame."""

    nav: tuple[str, ...]
    related: str
    cookies: str
    share: str
    legal: str
    next_page: str
    search: str


LABELS = {
    "en": Labels(
        nav=("Home", "Animals", "Diary", "Tickets", "Map", "About us", "Contact"),
        related="Related pages",
        cookies="This site uses cookies. By using it you agree. OK | Settings",
        share="Share Print Mail",
        legal="All rights reserved",
        next_page="Next page",
        search="Search this site",
    ),
    "zh": Labels(
        nav=("首页", "动物", "日记", "门票", "地图", "关于我们", "联系"),
        related="相关页面",
        cookies="本站使用 Cookie，继续浏览即表示同意。 确定 | 设置",
        share="分享 打印 邮件",
        legal="版权所有",
        next_page="下一页",
        search="站内搜索",
    ),
}
STYLE = "<style>body{margin:0 auto;max-width:60em}nav a{padding:4px}.side{float:right}</style>"
SCRIPT = '<script>window.dataLayer=window.dataLayer||[];(function(){var a="%s";})();</script>'


def render_html(
    rng: random.Random,
    host: str,
    layout: int,
    language: str,
    title: str,
    paragraphs: tuple[str, ...],
    *,
    markup: str | None = None,
    charset: str | None = None,
) -> str:
    """A whole page of a site; `layout` chooses its frame, `charset` is declared in a meta element."""
    labels = LABELS["zh" if language == "zh" else "en"]
    main = markup or "".join(f"<p>{escape(paragraph)}</p>\n" for paragraph in paragraphs)
    heading = escape(title)
    frame = LAYOUTS[layout % len(LAYOUTS)]
    declared = f'<meta charset="{charset}">' if charset else ""
    return (
        f'<!DOCTYPE html>\n<html lang="{language}">\n<head>{declared}'
        f"<title>{heading} - {host}</title>\n"
        f'<meta name="viewport" content="width=device-width">{STYLE}'
        f"{SCRIPT % f'{rng.getrandbits(40):x}'}</head>\n"
        f"<body>{frame(rng, host, labels, heading, main)}</body></html>\n"
    )


def _nav(rng: random.Random, labels: Labels) -> str:
    return "".join(f'<li><a href="/{rng.randint(1, 99)}">{name}</a></li>' for name in labels.nav)


def _related(rng: random.Random, labels: Labels) -> str:
    links = "".join(
        f'<li><a href="/p/{rng.randint(100, 9999)}">{rng.choice(labels.nav)} {rng.randint(1, 99)}</a></li>'
        for _ in range(rng.randint(3, 6))
    )
    return f"<h3>{labels.related}</h3><ul>{links}</ul>"


def _blog(rng: random.Random, host: str, labels: Labels, heading: str, main: str) -> str:
    return (
        f'<header class="site-header"><nav class="menu"><ul>{_nav(rng, labels)}</ul></nav></header>\n'
        f'<article class="post"><h1 class="entry-title">{heading}</h1>\n'
        f'<div class="entry-content">\n{main}</div></article>\n'
        f'<aside class="sidebar">{_related(rng, labels)}</aside>\n'
        f'<footer class="site-footer">&copy; {rng.randint(2001, 2024)} {host} {labels.legal}</footer>\n'
        f'<div id="cookie-banner" class="cookie-consent">{labels.cookies}</div>'
    )


def _encyclopedia(rng: random.Random, host: str, labels: Labels, heading: str, main: str) -> str:
    return (
        f'<div id="sidebar" class="navigation"><ul>{_nav(rng, labels)}</ul></div>\n'
        f'<div id="content" role="main"><h1>{heading}</h1>\n'
        f'<div id="mw-content-text">\n{main}</div></div>\n'
        f'<div id="footer"><a href="/legal">{labels.legal}</a> &nbsp; <a href="/feed">RSS</a></div>'
    )


def _news(rng: random.Random, host: str, labels: Labels, heading: str, main: str) -> str:
    return (
        f'<header><a class="logo" href="/">{host}</a>'
        f'<form role="search"><input type="search" placeholder="{labels.search}"></form></header>\n'
        f"<nav><ul>{_nav(rng, labels)}</ul></nav>\n"
        f"<main><article><h1>{heading}</h1>\n"
        f'<div class="share-buttons">{labels.share}</div>\n'
        f'<section class="article-body">\n{main}</section></article></main>\n'
        f"<aside>{_related(rng, labels)}</aside>\n"
        f"<footer><p>&copy; {host}</p><p>{labels.legal}</p></footer>"
    )


def _table(rng: random.Random, host: str, labels: Labels, heading: str, main: str) -> str:
    links = " | ".join(f'<a href="/{rng.randint(1, 99)}.htm">{name}</a>' for name in labels.nav)
    return (
        f'<center><font size="2">{links}</font></center><hr>\n'
        f'<h2>{heading}</h2>\n<div class="text">\n{main}</div>\n<hr>\n'
        f'<center><font size="1"><a href="/next.htm">{labels.next_page}</a> &copy; {host}</font></center>'
    )


def _app(rng: random.Random, host: str, labels: Labels, heading: str, main: str) -> str:
    return (
        f'<div class="cookie-notice" style="position:fixed">{labels.cookies}</div>\n'
        f'<div id="root"><nav class="navbar"><ul>{_nav(rng, labels)}</ul></nav>\n'
        f'<main class="container"><h1>{heading}</h1>\n<div class="content">\n{main}</div></main>\n'
        f'<div class="related">{_related(rng, labels)}</div>\n'
        f"<!-- build {rng.getrandbits(32):08x} -->"
        f'<footer class="footer">{labels.legal}</footer></div>\n'
        f"{SCRIPT % f'{rng.getrandbits(60):x}'}"
    )


LAYOUTS = (_blog, _encyclopedia, _news, _table, _app)

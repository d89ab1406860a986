"""Pages that a corpus should not keep: stubs, repetition, garbage, boilerplate, other languages, spam."""

import base64
import random
from dataclasses import dataclass
from html import escape

STUBS = {
    "en": (
        "Coming soon.",
        "Empty page",
        "Test",
        "No posts yet.",
        "Moved.",
        "Photo 4",
        "Hello world",
    ),
    "zh": ("敬请期待", "暂无内容", "测试", "还没有文章。", "图片", "页面已搬家。", "你好"),
}
CHANTS = {
    "en": (
        "buy cheap shoes online",
        "best hotel deals today",
        "click here for free gifts",
        "Download the full version now!",
        "hot news hot news",
        "Win a new phone every day!",
    ),
    "zh": (
        "便宜鞋子网上买",
        "今日酒店特价",
        "点击领取免费礼品",
        "马上下载完整版！",
        "热门新闻热门新闻",
        "天天送手机！",
    ),
}
MENU = {
    "en": (
        "Home", "News", "Sign in", "Register", "Contact us", "Help", "Site map", "Careers", "Press",
        "Terms of use", "Privacy", "Cookies", "Advertise", "RSS", "Mobile", "Partners", "Downloads",
        "Gallery", "Forum", "Members", "Archive", "Search", "Shop", "My account", "Newsletter",
    ),
    "zh": (
        "首页", "新闻", "登录", "注册", "联系我们", "帮助", "网站地图", "招聘", "媒体", "使用条款",
        "隐私", "广告服务", "手机版", "合作伙伴", "下载", "图库", "论坛", "会员", "存档", "搜索",
        "商店", "我的账户", "订阅", "留言", "友情链接",
    ),
}  # fmt: skip
NOTICES = {
    "en": (
        "We use cookies on this site. Accept all cookies | Manage cookies",
        "Please enable javascript in your browser",
        "All rights reserved",
        "Forgot your password? Reset password",
        "Lorem ipsum dolor sit amet, consectetur adipiscing elit",
        "Follow us | Share | Tweet | Pin it | Print",
    ),
    "zh": (
        "本网站使用 Cookie 接受全部 | 管理设置",
        "请在浏览器中启用 JavaScript",
        "版权所有 翻版必究 京ICP备00000000号",
        "忘记密码？重置密码",
        "上一页 下一页 返回顶部",
        "关注我们 | 分享 | 收藏 | 打印",
    ),
}
SPAM = {
    "en": (
        "Visit our lucky room and turn every coin into a fortune tonight.",
        "Members who join before midnight receive a welcome bonus.",
        "Our tables are open all night and the wheel never stops.",
        "Thousands of players have already left with a smile.",
    ),
    "zh": (
        "欢迎来到幸运大厅，今晚让每一枚硬币都变成财富。",
        "午夜以前加入的会员可以得到一份见面礼。",
        "我们的牌桌通宵开放，转盘从不停下。",
        "已经有几千名玩家带着笑容离开。",
    ),
}
OTHER = {
    "fr": (
        "Le matin, les enfants traversent le jardin avec leur grand-mère.",
        "Il faisait beau hier et nous avons mangé sous les arbres.",
        "La vieille maison se trouve derrière l'église du village.",
        "Chaque dimanche, mon oncle prépare une soupe avec des légumes.",
        "Elle a trouvé une lettre que personne n'avait encore ouverte.",
    ),
    "de": (
        "Am Morgen gehen die Kinder mit ihrer Großmutter durch den Garten.",
        "Gestern war das Wetter schön und wir haben unter den Bäumen gegessen.",
        "Das alte Haus steht hinter der Kirche des Dorfes.",
        "Jeden Sonntag kocht mein Onkel eine Suppe mit frischem Gemüse.",
        "Sie hat einen Brief gefunden, den noch niemand geöffnet hatte.",
    ),
    "es": (
        "Por la mañana los niños cruzan el jardín con su abuela.",
        "Ayer hizo buen tiempo y comimos debajo de los árboles.",
        "La casa vieja está detrás de la iglesia del pueblo.",
        "Todos los domingos mi tío prepara una sopa con verduras.",
        "Ella encontró una carta que nadie había abierto todavía.",
    ),
    "ru": (
        "Утром дети идут через сад вместе с бабушкой.",
        "Вчера была хорошая погода, и мы обедали под деревьями.",
        "Старый дом стоит за деревенской церковью.",
        "Каждое воскресенье мой дядя варит суп из овощей.",
        "Она нашла письмо, которое ещё никто не открывал.",
    ),
    "ja": (
        "朝になると、子どもたちはおばあさんと庭を歩きます。",
        "昨日は天気がよかったので、木の下でごはんを食べました。",
        "古い家は村の教会のうしろにあります。",
        "日曜日になると、おじさんは野菜のスープを作ります。",
        "彼女はまだ誰も開けていない手紙を見つけました。",
    ),
    "ko": (
        "아침이면 아이들은 할머니와 함께 정원을 걷습니다.",
        "어제는 날씨가 좋아서 나무 아래에서 점심을 먹었습니다.",
        "오래된 집은 마을 교회 뒤에 있습니다.",
        "일요일마다 삼촌은 채소로 국을 끓입니다.",
        "그녀는 아직 아무도 열지 않은 편지를 찾았습니다.",
    ),
}
MASH = "qwrtzpsdfghjklyxcvbnm;[]=-/.,<>?!@#$%^&*()_+{}|~0123456789"


@dataclass(frozen=True)
class Junk:
    """The main part of a junk page."""

    language: str
    title: str
    paragraphs: tuple[str, ...]
    markup: str | None = None
    """The main part as HTML where paragraphs would not show what it is."""


def stub(rng: random.Random, language: str) -> Junk:
    """A page with next to nothing on it."""
    return Junk(language, rng.choice(MENU[language]), (rng.choice(STUBS[language]),))


def repetition(rng: random.Random, language: str) -> Junk:
    """The same few words, over and over, in one line or in many."""
    chant = rng.choice(CHANTS[language])
    times = rng.randint(9, 40)
    match rng.randrange(3):
        case 0:
            paragraphs = ((" " if language == "en" else "").join([chant] * times),)
        case 1:
            paragraphs = (chant,) * times
        case _:
            other = rng.choice(CHANTS[language])
            paragraphs = (f"{chant} {other} {chant}", f"{other} {chant} {chant}") * (times // 2)
    return Junk(language, chant, paragraphs)


def garbage(rng: random.Random, language: str) -> Junk:
    """What is left of broken pages: noise, encoded bytes, mojibake, tables of numbers."""
    match rng.randrange(5):
        case 0:
            lines = [_noise(rng, rng.randint(30, 90)) for _ in range(rng.randint(4, 9))]
        case 1:
            lines = [
                base64.b64encode(rng.randbytes(54)).decode() for _ in range(rng.randint(4, 10))
            ]
        case 2:
            source = "".join(SPAM["zh"]) + "".join(STUBS["zh"])
            broken = source.encode("utf-8").decode("latin-1")
            lines = [broken[start : start + 90] for start in range(0, 360, 90)]
        case 3:
            lines = [
                " ".join(f"{rng.random() * 1000:.{rng.randint(1, 4)}f}" for _ in range(10))
                for _ in range(rng.randint(5, 10))
            ]
        case _:
            lines = [rng.randbytes(24).hex(" ") for _ in range(rng.randint(5, 10))]
    return Junk(language, _noise(rng, 8), tuple(lines))


def boilerplate(rng: random.Random, language: str) -> Junk:
    """A page that is only its own frame: menus, notices, lists of links."""
    labels = rng.sample(MENU[language], rng.randint(10, len(MENU[language])))
    notices = rng.sample(NOTICES[language], rng.randint(2, 4))
    lines = [*labels, *notices]
    match rng.randrange(3):
        case 0:
            links = "".join(
                f'<li><a href="/{rng.randint(1, 999)}">{label}</a></li>' for label in labels
            )
            markup = f"<ul>{links}</ul>" + "".join(f"<p>{escape(notice)}</p>" for notice in notices)
        case 1:
            lines = [" | ".join(labels), *notices]
            markup = "".join(f"<div>{escape(line)}</div>" for line in lines)
        case _:
            rng.shuffle(lines)
            markup = "<br>".join(escape(line) for line in lines)
    return Junk(language, rng.choice(labels), tuple(lines), markup)


def other_language(rng: random.Random) -> Junk:
    """Sound text in a language that nobody asked for."""
    language = rng.choice(list(OTHER))
    sentences = rng.sample(OTHER[language], rng.randint(3, len(OTHER[language])))
    separator = "" if language == "ja" else " "
    cut = rng.randint(1, len(sentences) - 1)
    paragraphs = (separator.join(sentences[:cut]), separator.join(sentences[cut:]))
    return Junk(language, sentences[0].split(" ")[0][:12], paragraphs)


def spam(rng: random.Random, language: str) -> Junk:
    """Well-formed text of a host that is on the block list."""
    sentences = rng.sample(SPAM[language], len(SPAM[language]))
    code = f"{rng.randint(1000, 9999)}."
    return Junk(
        language, sentences[0][:16], ((" " if language == "en" else "").join(sentences), code)
    )


def _noise(rng: random.Random, length: int) -> str:
    return "".join(rng.choice(MASH) for _ in range(length))

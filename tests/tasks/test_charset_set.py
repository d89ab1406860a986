"""Every page of a generated set decodes to the text it was made of; the text itself is the truth."""

import random

import pytest

from tasks.charset import decode

ZH = """金秋十月，对于中国足球来讲，没有收获，只有尴尬。
如何看待异乡好居老板娘控告程序员删代码这件事情？
贞元初年，入为太子宾客，出为福州刺史、御史中丞、福建观察使。
我从小在家被家人宠着，在学校被几个关系好的朋友宠着。
对圆圆香一直很有想法的，几年前曾经再三拉朋友去，但以后恐怕不会再去了。
后醍醐天皇从元亨元年起开始取代父亲后宇多法皇亲政，并致力于恢复庄园券契所。
狐狸住在山洞里，每天早上吃蜂蜜，中午睡觉，下午到河边去玩。
这家店的味道一般，服务员态度也不太好，下次不会再来了。
研究人员发现，气候变化使得北极熊的栖息地逐年缩小。
请先阅读说明书，然后按照步骤安装软件，最后重新启动计算机。"""
TW = """臺灣的天氣今天很好，我們去公園散步，看見了許多花與鳥。
政府表示，將於明年開始實施新的交通規則，以減少車禍的發生。
這間餐廳的牛肉麵非常好吃，服務人員的態度也很親切。
研究團隊發現，長時間使用電腦會對眼睛造成傷害，應該適度休息。
請先閱讀說明書，然後按照步驟安裝軟體，最後重新啟動電腦。
他從小就喜歡讀書，尤其是歷史與文學方面的書籍。
香港立法會昨日舉行會議，討論有關土地發展的問題。
爺爺每天早上都會到附近的學校運動場去跑步，風雨無阻。
颱風即將登陸，氣象局呼籲民眾做好防颱準備，避免外出。
圖書館裡收藏了許多珍貴的古籍，歡迎讀者前往參觀。"""
JA = """今日は天気がいいので、公園を散歩しました。
この店のラーメンはとても美味しくて、店員さんも親切です。
新しいパソコンを買ったので、古いデータを移行しなければなりません。
政府は来年から新しい交通規則を実施すると発表した。
図書館には珍しい古い本がたくさん所蔵されています。
キツネは洞窟に住んでいて、毎朝ハチミツを食べます。
台風が近づいているため、気象庁は注意を呼びかけている。
祖父は毎朝、近くの学校のグラウンドを走っています。
研究チームは、北極の氷が毎年減っていることを確認した。
使い方をよく読んでから、手順に従ってインストールしてください。"""
KO = """오늘은 날씨가 좋아서 공원에서 산책을 했습니다.
이 식당의 비빔밥은 정말 맛있고 직원들도 친절합니다.
정부는 내년부터 새로운 교통 규칙을 시행한다고 발표했다.
도서관에는 귀중한 옛날 책이 많이 소장되어 있습니다.
여우는 동굴에 살면서 매일 아침 꿀을 먹고 낮에는 잠을 잔다.
태풍이 다가오고 있으므로 외출을 삼가 주시기 바랍니다.
할아버지는 매일 아침 학교 운동장에서 달리기를 하신다.
연구팀은 북극의 얼음이 해마다 줄어들고 있다는 사실을 확인했다.
설명서를 잘 읽은 다음 순서대로 프로그램을 설치하십시오.
컴퓨터를 오래 사용하면 눈이 나빠질 수 있으니 쉬어야 합니다."""
SETS = [
    (ZH, "gb18030"),
    (ZH, "gbk"),
    (TW, "big5"),
    (JA, "shift_jis"),
    (JA, "euc_jp"),
    (KO, "euc_kr"),
    (ZH, "utf-8"),
    (TW, "utf-8"),
]
DECLARED = (None, "right", "utf-8", "iso-8859-1", "gbk", "big5", "shift_jis", "euc-kr", "nonsense")


def page(sentences: list[str], meta: str | None) -> str:
    charset = f'<meta charset="{meta}">' if meta else ""
    body = "".join(f"<p>{sentence}</p>\n" for sentence in sentences)
    return (
        f"<html><head>{charset}<title>{sentences[0][:8]}</title></head>\n<body>{body}</body></html>"
    )


@pytest.mark.parametrize(("lines", "encoding"), SETS, ids=lambda value: str(value)[:8])
def test_every_page_decodes_right_whatever_is_declared(lines: str, encoding: str) -> None:
    rng = random.Random(0)
    sentences = lines.split("\n")
    wrong: list[tuple[str | None, str]] = []
    for count in (1, 1, 1, 2, 3, 6):
        for declared in DECLARED:
            for start in range(len(sentences)):
                chosen = [sentences[start], *rng.sample(sentences, count - 1)]
                name = encoding if declared == "right" else declared
                content = page(chosen, rng.choice([None, name]))
                if decode(content.encode(encoding), declared=name) != content:
                    wrong.append((declared, chosen[0]))
    assert wrong == []

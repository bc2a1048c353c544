"""Which code page a Windows wrote names in, where the archive does not say: a guess, good enough for showing them.

Windows packs names in the code page of its language (Shift-JIS, GBK, Big5, Korean, Russian, Western) and marks them as
nothing. One guess is made for all names of an archive, by how ordinary the letters are that each code page makes of
their bytes. Every guess can be undone: two names of different bytes are never one text, so comparing texts (without
folding their case!) compares bytes.
"""

import re
import unicodedata
from collections.abc import Sequence

CODE_PAGES = ("cp437", "cp850", "cp1252", "cp932", "gbk", "cp949", "cp950", "cp866", "cp1251")
"""In the order in which equals are preferred; cp437 takes any bytes."""

_COMMON = {
    "cp932": (
        "日本写真画像新規人物犬猫年月夏冬春秋旅行東京大阪都海山空花子供家族友達私僕君彼女男先生学校電車食事料"
        "理風景夜朝誕結婚式撮影作品絵描表裏正面横顔全身上下左右前後赤青白黒緑色服着祭店旧保存用素材集合加工済"
        "名無題一二三四五六七八九十"
    ),
    "gbk": (
        "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里"
        "用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实"
        "日照片图像新建文件夹狗猫微信截屏拍摄月副训练集女男孩头脸花海山春夏秋冬红蓝白黑绿色美丽风景旅游爱宝朋"
        "友素材正侧全身半张王李刘陈杨"
    ),
    "cp950": (
        "的一是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你對生能而子那得於著下自之年過發後作裡"
        "用道行所然家種事成方多經麼去法學如都同現當沒動面起看定天分還進好小部其些主樣理心她本前開但因只從想實"
        "日照片圖像新增資料夾狗貓截拍攝月訓練集女男孩頭臉花海山春夏秋冬紅藍白黑綠色美麗風景旅遊愛寶朋友台灣香"
        "港北正側全身半張王李劉陳楊"
    ),
    "cp949": (
        "이다의가을를은는에서한하고지로기사진그림새폴더강아양나너우리여름겨울봄족친구바산꽃집자동차음식학교생"
        "일결혼행부국어린남녀얼굴정면측전신상좌빨간파란검흰색초록빛밤낮시월년인물풍경작품원본복무제훈련모내것"
        "들"
    ),
}
"""Letters that are frequent in the language of a code page, above all in names of pictures and folders."""
_COMMON_LATIN = "äöüßéèàçñáíóúâêîôûëïåøæãœÄÖÜÉÅØ"
_LEVEL_ONE = {  # lead bytes of the characters that each standard puts first because they are used most
    "cp932": range(0x88, 0x98),
    "gbk": range(0xB0, 0xD8),
    "cp949": range(0xB0, 0xC9),
    "cp950": range(0xA4, 0xC7),
}


def decode(names: Sequence[bytes]) -> list[str]:
    """The names (which are no UTF-8) as text, by the likeliest code page.

    Without a likely one they are in cp437, and a backslash in them is a letter: it is the second half of many letters
    elsewhere, and must not become the end of a folder.
    """
    best, best_score = "", 0.0
    for page in CODE_PAGES:
        texts = [_exactly(name, page) for name in names]
        score = sum(_score(text, page) if text is not None else float("-inf") for text in texts)
        if score > best_score:
            best, best_score = page, score
    if best:
        return [name.decode(best) for name in names]
    return [name.decode("cp437").replace("\\", "＼") for name in names]


def _exactly(name: bytes, page: str) -> str | None:
    """The name in this code page, or None where it is none, or another name would become the same text."""
    try:
        text = name.decode(page)
        return text if text.encode(page) == name else None
    except UnicodeError:
        return None


def _score(text: str, page: str) -> float:
    """How ordinary a text is for the language of its code page: points for each byte that is not ASCII."""
    if page in _COMMON:
        return sum(_score_east(letter, page) * len(letter.encode(page)) for letter in text if not letter.isascii())
    return sum(_score_word(word, page) for word in re.findall(r"[^\W\d_]+|[^\w\s]|\s", text))


def _score_east(letter: str, page: str) -> float:
    data = letter.encode(page)
    name = unicodedata.name(letter, "")
    if letter in _COMMON[page] or (page == "cp932" and re.match("(HIRAGANA|KATAKANA)", name)):
        return 3
    if name.startswith(("FULLWIDTH", "IDEOGRAPHIC")) or letter in "、。・「」『』【】《》（）～ー々":
        return 1
    script = "HANGUL" if page == "cp949" else "CJK UNIFIED"
    if not name.startswith(script):
        return 0.3 if name.startswith("HALFWIDTH KATAKANA") else -3
    if data[0] in _LEVEL_ONE[page] and (page in ("cp932", "cp950") or data[1] >= 0xA1):
        return 1.4 if page == "cp949" else 1  # all in its few leading bytes is chance for a Chinese name
    return 0.05 if page in ("cp932", "cp950") or data[0] >= 0xB0 <= data[1] else -1.5


def _score_word(word: str, page: str) -> float:
    """A run of letters, or one sign, in a code page of one byte a letter."""
    foreign = [letter for letter in word if not letter.isascii()]
    if not foreign:
        return 0
    if not word.isalpha():
        return -3
    ordinary = word.islower() or word.istitle() or word.isupper()
    if page in ("cp866", "cp1251"):
        if not ordinary or not re.fullmatch("[А-яЁё]+", word):
            return -2 * len(foreign)
        return (0, 0, 1)[len(word)] * len(word) if len(word) < 3 else 2 * len(word)
    if not ordinary or not all(unicodedata.name(letter, "").startswith("LATIN") for letter in word):
        return -2 * len(foreign)
    if len(word) <= 2 * len(foreign):
        return 0.1
    return sum(4 if letter in _COMMON_LATIN else 2 for letter in foreign)

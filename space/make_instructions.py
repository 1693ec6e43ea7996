"""Write the instructions that the assistant of the Space is trained and tested on, from public data sets.

    python space/make_instructions.py --data data data/more --output runs/space/instructions

Stories become answers: who and what is in a story, and how it ends, becomes the request for it. What the assistant
cannot do is answered with one sentence. Writes train.json and test.json; the same files give the same rows. Test rows
have a `kind`, and those that ask for a story say what it `must_use`.
"""

import argparse
import functools
import json
import random
import re
from collections import Counter
from pathlib import Path

from make_data import SEED, clean, documents, read

from scratch_gpt2.cli import run_main

GREETING = "Hello! Who shall I tell a short story about?"
WHO = "I am a small language model. I tell short stories: say about whom, or with which words."
REFUSAL = "I only tell short stories, so I cannot answer that."
WELCOME = "You are welcome! Who shall the next story be about?"
GOODBYE = "Goodbye! Come back for another story."

SMALL_TALK = {
    GREETING: ["hi", "hello", "hey", "hi there", "hello there", "hey there", "good morning", "good evening",
               "how are you?", "hello, how are you?", "hi, how are you today?", "hello assistant",
               "hi! how is it going?", "good day", "hey, what's up?", "greetings"],
    WHO: ["who are you?", "what are you?", "what can you do?", "what is your name?", "are you a robot?",
          "are you human?", "tell me about yourself", "what do you do?", "how can you help me?",
          "can you help me?", "are you an AI?", "who made you?", "introduce yourself", "help",
          "what are you able to do?"],
    WELCOME: ["thanks", "thank you", "thank you very much", "thanks a lot", "that was a nice story, thanks", "great"],
    GOODBYE: ["bye", "goodbye", "good night", "see you later", "bye bye"],
}  # fmt: skip
SMALL_TALK_TEST = {
    GREETING: ["Hello!", "good afternoon", "hey, how are you doing?", "Hi, nice to meet you."],
    WHO: ["Who are you", "What is it that you can do?", "are you a person?", "Tell me who you are."],
    WELCOME: ["Thank you so much!"],
    GOODBYE: ["Bye, see you!"],
}
# Names of many countries, for a third of the stories: a model learns to copy a name where it cannot guess it.
NAMES = """
Adaeze Ahmed Akira Alejandro Amara Amir Anders Andrei Anika Antonio Anya Arjun Asha Astrid Ayaan Bao Beatriz Bilal
Bjorn Bruno Camila Carlos Carmen Chen Chidi Chiara Dalia Darius Deepa Diego Dilan Elena Elias Emeka Emre Enzo
Esther Fatima Felix Filip Francesca Freya Gabriel Giulia Hamza Hana Hassan Hiro Hugo Ibrahim Ines Irina Isamu Ivan
Jabari Jin Joao Jorge Kaito Kamal Karim Katya Kenji Khadija Kiran Lars Layla Leila Lorenzo Lucia Magnus Malik
Marisol Marta Mei Mikhail Mina Mohamed Nadia Naomi Natasha Nia Niko Nikhil Noor Nuno Olga Oskar Pablo Paolo Pavel
Pedro Petra Rafael Rahul Rania Rashid Rosa Ruben Sana Sanjay Santiago Selma Sergio Sofia Soren Sunita Svetlana
Tariq Tatiana Thabo Thiago Tomas Uma Valentina Vikram Viktor Wanjiru Wei Xavier Yara Yasmin Youssef Yusuf Zahra
Zainab Zara Zeynep Zoya
"""
# Made-up names of two or three syllables are for another third.
ONSETS, VOWELS, CODAS = (
    ("b", "d", "g", "j", "k", "l", "m", "n", "r", "t", "v", "dr", "tr"),
    "aeiou",
    ("", "", "r", "l"),
)
# Names that no story has, for the test.
NEW_NAMES = ("Ravi", "Priya", "Kofi", "Ingrid", "Mateo", "Yuki", "Omar", "Zsofia", "Dmitri", "Aisha")

ASK = ("Tell a short story", "Tell me a story", "Write a short story", "Tell me a short story", "Write a story")
POLITE = ("", "", "", "Please t", "Can you t", "Could you t")
CONTINUE = ("Continue this story.", "Continue the story.", "Go on with this story.", "How does this story go on?")
# Declined: a model of this size sees tokens, not letters, and got most opposites wrong.
ABOUT_WORDS = (
    "How do you spell {}?", "Spell the word {}.", "How is '{}' spelled?", "What is the plural of '{}'?",
    "Give the plural of {}.", "What is the opposite of '{}'?", "Give an antonym of {}.", "What does {} mean?",
)  # fmt: skip

MAX_STORY_CHARACTERS = 900
# Each story answers several requests, with another name each time.
REQUESTS_A_STORY, SAD_STORIES = 4, 3000
REFUSALS, QUESTIONS_ABOUT_WORDS, TWO_TURNS = 3000, 600, 1500
REFUSALS_REPEATED, SMALL_TALK_REPEATED = 4, 16
TEST_STORIES, TEST_REFUSALS = 20, 40
KINDS, SHARES = ("name", "words", "ending", "who", "continue"), (25, 45, 8, 15, 7)

WORD = re.compile(r"\b[a-z]{3,}\b(?!')")
NAMED = re.compile(r"\ban? ((?:\w+ )?\w+) (?:named|called) ([A-Z][a-z]+)\b")
NAME = re.compile(r"(?<=[a-z,] )([A-Z][a-z]{2,})\b")
NO_NAMES = {
    "The",
    "Mom",
    "Dad",
    "Mommy",
    "Daddy",
    "Mama",
    "Momma",
    "Papa",
    "Mum",
    "Mummy",
    "Mrs",
    "Grandma",
    "Grandpa",
}
HAPPY = re.compile(r"\b(happy|happily|smil\w+|friends|proud|laugh\w*|fun|loved|joy)\b")
SAD = re.compile(r"\b(sad|sadly|cried|crying|lost|died|gone|alone|hurt|broke|broken)\b")
HE, SHE = re.compile(r"\b(he|him|his)\b"), re.compile(r"\b(she|her|hers)\b")
SENTENCE_END = re.compile(r'(?<=[.!?"])\s+(?=["A-Z])')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="folders with the data sets")
    parser.add_argument("--output", type=Path, required=True, help="folder for train.json and test.json")
    arguments = parser.parse_args()
    train, test = instruction_rows(arguments.data)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        (arguments.output / f"{name}.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        print(name, dict(Counter(row.get("kind", "two turns") for row in rows)))


def instruction_rows(folders: list[Path]) -> tuple[list[dict], list[dict]]:
    rng = random.Random(SEED)
    stories = clean(documents(folders, "tinystories_train.txt"))
    held_out = clean(documents(folders, "tinystories_valid.txt"))[1:]  # the first begins in its middle
    words = StoryWords(stories)
    test = test_story_rows(held_out, words, random.Random(SEED))
    train = story_rows(stories, words, rng)
    refusals, refusals_test = refusal_rows(folders, words, rng)
    small_talk, small_talk_test = small_talk_rows(rng)
    train += REFUSALS_REPEATED * refusals + SMALL_TALK_REPEATED * small_talk
    test += refusals_test + small_talk_test
    rng.shuffle(train)
    return [*train, *two_turns(train, rng)], test


def json_lines(folders: list[Path], name: str) -> list[dict]:
    return [json.loads(line) for line in read(folders, name).splitlines()]


def row(kind: str, instruction: str, output: str, given: str = "", must_use: list[str] | None = None) -> dict:
    wanted = {} if must_use is None else {"must_use": must_use}
    return {"kind": kind, "instruction": instruction, "input": given, "output": output, **wanted}


class StoryWords:
    """What is known of the words of the stories: in how many each is, the names, and who of these is he or she."""

    def __init__(self, stories: list[str]):
        self.stories_with = Counter(word for story in stories for word in set(re.findall(r"\b[a-z]+\b", story)))
        self.after_article = {word for story in stories for word in re.findall(r"\ban? ([a-z]{3,})\b", story)}
        self.he_or_she: Counter[str] = Counter()
        for story in stories:
            if name := main_name(story):
                self.he_or_she[name] += len(HE.findall(story)) - len(SHE.findall(story))

        self.names: dict[bool, list[str]] = {True: [], False: []}  # of a he, and of a she
        for name in sorted(self.he_or_she):
            self.names[self.he_or_she[name] > 0].append(name)

    def names_like(self, name: str) -> list[str]:
        return self.names[self.he_or_she[name] > 0]

    def telling(self, story: str) -> list[str]:
        """Words from the first half of a story that are neither too rare to be learned nor in every story, those that
        the story uses most first."""
        counts = Counter(re.findall(WORD, story))
        early = set(re.findall(WORD, story[: len(story) // 2]))
        known = [word for word in counts if word in early and 15 <= self.stories_with[word] <= 900]
        return sorted(known, key=lambda word: (-counts[word], self.stories_with[word]))


@functools.cache
def main_name(story: str) -> str | None:
    """The name that is used most within sentences; None where none is used twice."""
    names = Counter(name for name in NAME.findall(story) if name not in NO_NAMES)
    name, uses = next(iter(names.most_common(1)), ("", 0))
    return name if uses >= 2 else None


def ending_of(story: str) -> str | None:
    last = " ".join(SENTENCE_END.split(story)[-2:]).lower()
    happy, sad = bool(HAPPY.search(last)), bool(SAD.search(last))
    return None if happy == sad else "happy" if happy else "sad"


def story_rows(stories: list[str], words: StoryWords, rng: random.Random) -> list[dict]:
    short = [story for story in stories if len(story) <= MAX_STORY_CHARACTERS]
    sad = [story for story in short if ending_of(story) == "sad"]
    chosen = REQUESTS_A_STORY * short + rng.choices(sad, k=SAD_STORIES)
    return [story_row(with_other_name(story, words, rng), words, rng) for story in chosen]


def with_other_name(story: str, words: StoryWords, rng: random.Random) -> str:
    """Nine stories in ten get another name, or a name would tell the story."""
    name = main_name(story)
    if name is None or rng.random() < 0.1:
        return story
    other = rng.choice((rng.choice(NAMES.split()), rng.choice(words.names_like(name)), made_up_name(rng)))
    return story if other in story else re.sub(rf"\b{name}\b", other, story)


def made_up_name(rng: random.Random) -> str:
    syllables = (rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((2, 3))))
    return "".join(syllables).capitalize() + rng.choice(CODAS)


def story_row(story: str, words: StoryWords, rng: random.Random, kind: str | None = None) -> dict:
    """One request for `story`; one of the five kinds that fit it, or `kind`."""
    name, who = main_name(story), NAMED.search(story)
    kind = kind or rng.choices(KINDS, SHARES)[0]
    if kind == "continue":
        sentences = SENTENCE_END.split(story)
        begun = " ".join(sentences[: 2 if len(sentences) > 4 else 1])
        return row(kind, rng.choice(CONTINUE), story[len(begun) :].strip(), begun)
    if kind == "who" and who:
        asked = f" about a {who[1]} named {who[2]}" if rng.random() < 0.6 else f" about a {who[1]}"
        used = [who[1].split()[-1], *([who[2]] if who[2] in asked else [])]
    elif kind == "words" and (telling := words.telling(story)):
        chosen = rng.sample(telling[:4], min(rng.choice((1, 2, 3)), len(telling[:4])))
        about = f" about {name}" if name and rng.random() < 0.3 else ""
        asked = f"{about} with the word{'s' if len(chosen) > 1 else ''} {enumeration(chosen)}"
        used = [*chosen, *([name] if name and about else [])]
    elif kind == "ending" and (ending := ending_of(story)):
        asked = (f" about {name}" if name and rng.random() < 0.5 else "") + f" with a {ending} ending"
        used = [name] if name and name in asked else []
    else:
        kind, asked, used = "name", f" about {name}" if name else "", [name] if name else []
    return row(kind, request(asked, rng), story, must_use=used)


def enumeration(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def request(asked: str, rng: random.Random) -> str:
    polite, sentence = rng.choice(POLITE), rng.choice(ASK) + asked
    if polite and sentence.startswith("T"):
        return polite + sentence[1:] + ("?" if polite.startswith("C") else ".")
    return sentence + "."


def test_story_rows(held_out: list[str], words: StoryWords, rng: random.Random) -> list[dict]:
    """TEST_STORIES of each kind, and as many that ask for a name that no story has."""
    rows: list[dict] = []
    stories = iter(rng.sample(held_out, len(held_out)))
    for kind in KINDS:
        while sum(one["kind"] == kind for one in rows) < TEST_STORIES:
            made = story_row(next(stories), words, rng, kind)
            if made["kind"] == kind and made.get("must_use") != []:
                rows.append(made)
    while sum(one["kind"] == "new name" for one in rows) < TEST_STORIES:
        story, new = next(stories), rng.choice(NEW_NAMES)
        if name := main_name(story):
            rows.append(row("new name", request(f" about {new}", rng), story.replace(name, new), must_use=[new]))
    return rows


def refusal_rows(folders: list[Path], words: StoryWords, rng: random.Random) -> tuple[list[dict], list[dict]]:
    """Short questions of fact, tasks, sums and questions about words, none of which is about stories."""
    names = ("dolly_subset", "qa_short", "self_instruct_seed_tasks", "self_instruct_user_oriented")
    sets = [json_lines(folders, f"{name}.jsonl") for name in names]
    sets.append(json.loads(read(folders, "instruction-data.json")))
    sets.append([one for one in json_lines(folders, "programmatic_math_spelling.jsonl") if "math" in one["kind"]])
    asked: list[str] = []
    for rows in sets:
        questions = [one["instruction"] for one in rows if is_for_others(one)]
        asked += rng.sample(questions, min(len(questions), (REFUSALS + TEST_REFUSALS) // len(sets) + 1))
    nouns = rng.sample(sorted(words.after_article), QUESTIONS_ABOUT_WORDS)
    asked += [rng.choice(ABOUT_WORDS).format(word) for word in nouns]
    rng.shuffle(asked)
    made = [row("refusal", question, REFUSAL) for question in dict.fromkeys(asked)]
    return made[TEST_REFUSALS:], made[:TEST_REFUSALS]


def is_for_others(one: dict) -> bool:
    instruction = one["instruction"]
    ours = re.search(r"stor(y|ies)", instruction, re.IGNORECASE)
    if one.get("dataset") == "piqa" or ours or one["input"]:
        return False
    return 15 <= len(instruction) <= 120 and instruction.isascii()


def small_talk_rows(rng: random.Random) -> tuple[list[dict], list[dict]]:
    train, test = [], []
    for answer, said in SMALL_TALK.items():
        for text in said:
            bare = text.rstrip("?")
            forms = {text, text.capitalize(), bare, f"{bare}!", f"{bare.capitalize()}.", text.upper()}
            train += [row("small talk", form, answer) for form in sorted(forms)]
    for answer, said in SMALL_TALK_TEST.items():
        test += [row("small talk", text, answer) for text in said]
    trained = {one["instruction"] for one in train}
    return train, [one for one in test if one["instruction"] not in trained]


def two_turns(rows: list[dict], rng: random.Random) -> list[dict]:
    """Conversations of two questions, as they come about in the Space."""
    short = [one for one in rows if len(one["output"]) < 500 and not one["input"]]
    pairs = zip(rng.sample(short, TWO_TURNS), rng.sample(short, TWO_TURNS), strict=True)
    return [{"messages": [message for one in pair for message in messages(one)]} for pair in pairs]


def messages(one: dict) -> list[dict[str, str]]:
    return [{"role": "user", "content": one["instruction"]}, {"role": "assistant", "content": one["output"]}]


if __name__ == "__main__":
    run_main(main)

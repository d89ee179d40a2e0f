"""Word lists, sentence frames and facts for `demo_data`: one list to train, one held out."""

from __future__ import annotations


def _list(text: str) -> list[str]:
    """Split `text` at the bars, or at white space when it has none."""
    return text.split("|") if "|" in text else text.split()


FIRST_NAMES = {
    "train": _list(
        "Anna Ben Carla David Elena Felix Grace Henry Ines Jack Karen Liam Maria Noah Olga Peter "
        "Rosa Samuel Tina Victor Wendy Xavier Yara Zack Alice Brian Chloe Derek Emma Frank Gloria "
        "Hugo Irene James Kate Leo Megan Nathan Oscar Paula Robert Sarah Thomas Ursula Walter"
    ),
    "held_out": _list("Martin Julia Simon Laura Patrick Helen Daniel Sophie Edward Nina"),
}
LAST_NAMES = {
    "train": _list(
        "Adams Baker Clark Dixon Evans Fisher Garcia Hughes Ivanov Jensen Keller Lopez Miller "
        "Nelson Olsen Parker Quinn Rossi Schmidt Turner Vargas Walker Young Ziegler Bennett Cohen "
        "Duarte Ellis Foster Grant Harris Ito Johnson King Lewis Moreno Novak Owens Peterson Reed"
    ),
    "held_out": _list("Carter Wagner Morgan Silva Murray Fischer Cooper Tanaka Bailey Hansen"),
}
# A few dozen cities would be learned by heart; made-up towns make the adapter copy what it reads.
TOWN_STARTS = _list(
    "Ash Oak Mil Wood Clay Stan Hart Kings Lang Mar Nor Red Shel Thorn Wes Brad Har"
)
TOWN_ENDS = _list("ford bury ton ville dale port field mouth ham by stead wick")
CITIES = {
    "train": _list(
        "Paris Berlin London Madrid Lisbon Vienna Dublin Oslo Prague Athens Boston Chicago Denver "
        "Seattle Toronto Sydney Tokyo Delhi Cairo Lima Miami Houston Geneva Milan Naples Munich "
        "Brussels Oxford Portland Cambridge Porto Bergen Krakow Osaka Montevideo"
    )
    + [start + end for start in TOWN_STARTS for end in TOWN_ENDS],
    "held_out": _list("Rome Dallas Hamburg Montreal Warsaw Phoenix Bristol Kyoto"),
}
CONTACT_FRAMES = {
    "train": (
        "{name} from {city} can be reached at {phone}.",
        "Call {name} in {city} on {phone}.",
        "My neighbour {name} moved to {city}; the number is {phone}.",
        "You will find {name} in {city}, phone {phone}.",
        "Please ring {phone} and ask for {name} in {city}.",
        "{phone} is the number of {name}, who lives in {city}.",
        "In {city} we work with {name} ({phone}).",
        "The {city} office is run by {name}, so try {phone}.",
    ),
    "held_out": (
        "I met {name} in {city} and wrote down the number {phone}.",
        "Our contact in {city} is {name}, telephone {phone}.",
        "{name} just opened a shop in {city}. The phone number is {phone}.",
    ),
}

REVIEWED_THINGS = {
    "train": _list(
        "film|hotel|soup|phone|book|concert|train ride|haircut|laptop|museum|pizza|teacher|garden|"
        "sofa|game|coat|lecture|beach|camera|bakery"
    ),
    "held_out": _list("restaurant|song|car|play|coffee|bicycle|tour|printer"),
}
REVIEW_PHRASES = {
    "positive": {
        "train": _list(
            "was wonderful|made me smile all day|is worth every penny|was better than I hoped|"
            "is simply perfect|was a real pleasure|exceeded our expectations|is my new favourite|"
            "was great fun|left us happy|is the best I have had|was lovely from start to finish|"
            "deserves five stars|impressed everyone|was excellent|is a joy|was truly beautiful|"
            "worked flawlessly|was charming|is superb"
        ),
        "held_out": _list(
            "was fantastic|delighted all of us|is amazing|was a great surprise|is outstanding|"
            "was brilliant and I would gladly come back|is something I love"
        ),
    },
    "negative": {
        "train": _list(
            "was terrible|ruined my whole day|is not worth a penny|was worse than I feared|"
            "is simply broken|was a real pain|failed our expectations|is my worst purchase|"
            "was deadly boring|left us angry|is the worst I have had|was ugly from start to finish|"
            "deserves no stars|annoyed everyone|was dreadful|is a nightmare|was truly disgusting|"
            "broke at once|was rude and cold|is rubbish"
        ),
        "held_out": _list(
            "was awful|disappointed all of us|is a disaster|was a waste of money|is horrible|"
            "was so bad that I want a refund|is something I hate"
        ),
    },
}
REVIEW_FRAMES = {
    "train": (
        "The {thing} {phrase}.",
        "Honestly, the {thing} {phrase}.",
        "I must say that this {thing} {phrase}.",
        "We tried it last week: the {thing} {phrase}.",
        "My sister thinks the {thing} {phrase}.",
        "Yes, that {thing} {phrase}!",
    ),
    "held_out": (
        "In my opinion the {thing} {phrase}.",
        "Everyone in the family agreed that the {thing} {phrase}.",
        "After two days I can say: this {thing} {phrase}.",
    ),
}

# Question, answer, and the pairs that fill both.
FACT_TABLES: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "What is the capital of {}?",
        "The capital of {} is {}.",
        (
            ("France", "Paris"),
            ("Germany", "Berlin"),
            ("Spain", "Madrid"),
            ("Norway", "Oslo"),
            ("Austria", "Vienna"),
            ("Egypt", "Cairo"),
            ("Peru", "Lima"),
            ("Greece", "Athens"),
            ("Ireland", "Dublin"),
            ("Cuba", "Havana"),
        ),
    ),
    (
        "What is the opposite of {}?",
        "The opposite of {} is {}.",
        (
            ("hot", "cold"),
            ("big", "small"),
            ("fast", "slow"),
            ("early", "late"),
            ("hard", "soft"),
            ("rich", "poor"),
            ("open", "closed"),
            ("full", "empty"),
            ("dark", "bright"),
            ("old", "young"),
        ),
    ),
    (
        "What does a {} do?",
        "A {} {}.",
        (
            ("baker", "bakes bread and cakes"),
            ("teacher", "helps pupils to learn"),
            ("farmer", "grows food in the fields"),
            ("doctor", "looks after sick people"),
            ("pilot", "flies planes across the world"),
            ("tailor", "sews and repairs clothes"),
            ("gardener", "takes care of plants"),
            ("plumber", "mends pipes and taps"),
            ("lawyer", "gives advice about the law"),
            ("singer", "sings songs on a stage"),
        ),
    ),
)
GENERAL_QUESTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "train": (
        ("Why do birds sing?", "Birds sing to find a partner and to defend their home."),
        ("How do I make tea?", "Pour boiling water over the tea leaves and wait four minutes."),
        ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."),
        ("Why is the sea salty?", "Rivers carry salt from rocks into the sea."),
        ("How can I sleep better?", "Go to bed at the same time every night and avoid screens."),
        ("What is gravity?", "Gravity is the force that pulls things towards the earth."),
        ("How many legs does a spider have?", "A spider has eight legs."),
        ("Where do penguins live?", "Most penguins live on the cold coasts of the south."),
        ("What is a good name for a dog?", "A good name for a dog is Max."),
        ("How do I save money?", "Write down what you spend and put a little aside each month."),
        ("What can I cook tonight?", "You could cook pasta with tomatoes and garlic."),
        ("Who invented the light bulb?", "Thomas Edison made the first practical light bulb."),
        ("What are clouds made of?", "Clouds are made of tiny drops of water."),
        ("Is a whale a fish?", "No, a whale is a mammal that lives in the sea."),
        ("Tell me something about cats.", "Cats sleep most of the day and hunt at night."),
        ("What should I read next?", "Try a short novel by Jane Austen."),
        ("How do bees make honey?", "Bees collect nectar and dry it in their hive."),
        ("What do you need to paint a wall?", "You need paint, a brush, a roller and some tape."),
        ("Give me advice for a job interview.", "Arrive early, be honest and ask good questions."),
        ("What is a volcano?", "A volcano is a mountain that can throw out hot rock."),
        ("Why do we need water?", "Our bodies need water to stay cool and healthy."),
        ("How long is a football match?", "A football match lasts ninety minutes."),
        ("Describe a sunny morning.", "The light is warm, the air is fresh and birds are singing."),
        ("What is the moon?", "The moon is a ball of rock that circles the earth."),
        ("Can you recommend a hobby?", "You could learn to play the guitar."),
        ("What makes a good friend?", "A good friend listens and keeps promises."),
        ("Why do leaves fall in autumn?", "Trees drop their leaves to save water in winter."),
        ("What does a computer do?", "A computer stores data and follows instructions."),
        ("Hello there!", "Hello, it is nice to meet you."),
        ("Good evening.", "Good evening, how can I help you today."),
    ),
    "held_out": (
        ("Why is the sky blue?", "Air scatters blue light more than red light."),
        ("How do I boil an egg?", "Put the egg in boiling water for eight minutes."),
        ("Who wrote Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet."),
        ("What is photosynthesis?", "Plants use light to turn water and air into sugar."),
        ("How many days are in a week?", "There are seven days in a week."),
        ("Where do kangaroos live?", "Kangaroos live in Australia."),
        ("How do I learn a new language?", "Practise a little every day and talk to people."),
        ("What is the largest planet?", "The largest planet is Jupiter."),
        ("Why do we dream?", "Dreams may help the brain to sort memories."),
        ("What is a good gift for my mother?", "A bunch of flowers is a good gift."),
        ("How does a bicycle stay upright?", "Its wheels steer into the fall while it rolls."),
        ("Tell me about elephants.", "Elephants are the largest animals on land."),
        ("What should I pack for a trip?", "Pack clothes, papers and a good book."),
        ("What causes thunder?", "Lightning heats the air so fast that it bangs."),
        ("Is the sun a star?", "Yes, the sun is a star."),
        ("How can I stay healthy?", "Eat well, sleep enough and move every day."),
        ("Describe a winter evening.", "Snow falls softly while the windows glow."),
        ("Who was Albert Einstein?", "Albert Einstein was a famous physicist."),
        ("What is bread made of?", "Bread is made of flour, water, yeast and salt."),
        ("Thanks for your help!", "You are welcome, come back soon."),
    ),
}

MONTHS = _list(
    "January February March April May June July August September October November December"
)
DATE_FORMATS = ("{month} {day}, {year}", "{day} {month} {year}")
EVENTS = {
    "train": _list(
        "concert|wedding|exam|launch|final game|conference|festival|opening|first meeting|"
        "court hearing|school trip|auction|lunar eclipse|election|marathon"
    ),
    "held_out": _list("birthday party|harvest|board vote|ferry crossing|rehearsal|book fair"),
}
DATE_FRAMES = {
    "train": (
        "The {event} is on {date}.",
        "We moved the {event} to {date}.",
        "On {date} the {event} takes place.",
        "{date} is the day of the {event}.",
        "Do not forget the {event} on {date}!",
        "They say that the {event} was held on {date}.",
    ),
    "held_out": (
        "Everybody remembers the {event} of {date}.",
        "The {event} starts on {date} at noon.",
        "My diary says {date}: {event}.",
    ),
}

TABLES = {
    "train": _list(
        "customers orders products employees invoices books movies students flights rooms cars "
        "patients tickets suppliers cities players songs courses apples boats cameras devices "
        "events farms gardens houses islands jobs kitchens lakes machines nurses offices parks "
        "restaurants shops tasks users villages wines accounts bikes dogs engines fields guests "
        "horses items letters museums novels phones projects rivers schools trucks writers"
    ),
    "held_out": _list("hotels teachers games animals recipes buildings trains members"),
}
COLUMNS = {
    "train": _list(
        "name price email age city country date total status title year rating salary weight "
        "color stock department phone amount balance brand code depth discount duration grade "
        "group income kind length level location manager mileage model month number origin power "
        "profit quantity region role shape speed street style supplier tax temperature type unit "
        "value volume width zone"
    ),
    "held_out": _list("address height cost language owner score size category"),
}
VALUES = {
    "train": _list(
        "Berlin Paris red blue open closed French Spanish Anna Thomas new active paid large "
        "summer winter London gold black white broken clean cold Danish early fast German heavy "
        "hot Irish Japanese Karen late light local Lisbon Maria medium modern north old orange "
        "Peter public quiet ready round sold south Swedish tall urgent Vienna warm wooden yellow"
    ),
    "held_out": _list("green Italian small Madrid pending Laura silver empty"),
}
QUERY_FRAMES = {
    "train": (
        "Show the {column} of all {table} whose {key} {condition}.",
        "I need the {column} of every one of the {table} where the {key} {condition}.",
        "Which {column} do the {table} have whose {key} {condition}?",
        "List the {column} for {table} if the {key} {condition}.",
        "For {table} whose {key} {condition}, what is the {column}?",
    ),
    "held_out": (
        "Give me the {column} of those {table} where {key} {condition}.",
        "What {column} have the {table} with a {key} that {condition}?",
        "Find the {column} of the {table} whose {key} {condition}.",
    ),
}

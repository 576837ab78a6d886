//! Who and what the stories are about. The names of the test split appear in no story of the other.

/// Names of one kind: those of the training split, and those held out for the test split.
pub(crate) struct Names {
    pub(crate) train: [&'static str; 48],
    pub(crate) test: [&'static str; 24],
}

/// Things that can be inside each other. Any fits in any: plausible sizes would give the order away.
pub(crate) const THINGS: Names = Names {
    train: [
        "apple", "bag", "ball", "barrel", "basket", "bell", "book", "boot", "bottle", "bowl",
        "box", "bucket", "can", "candle", "cap", "card", "cart", "case", "chest", "clock", "coat",
        "coin", "cup", "drawer", "drum", "egg", "flask", "glove", "hat", "jar", "jug", "key",
        "lamp", "leaf", "mask", "mug", "nest", "nut", "pan", "pearl", "pot", "ring", "rug", "sack",
        "shoe", "spoon", "stone", "tin",
    ],
    test: [
        "trunk", "urn", "vase", "wagon", "wallet", "tub", "tent", "tray", "sock", "sled", "shell",
        "scarf", "quilt", "purse", "pouch", "pillow", "pebble", "locket", "lantern", "kettle",
        "hamper", "feather", "crate", "button",
    ],
};

/// People who can hand things to each other.
pub(crate) const PEOPLE: Names = Names {
    train: [
        "Ada", "Alma", "Amos", "Anna", "Arlo", "Bea", "Ben", "Boris", "Carl", "Cleo", "Cora",
        "Dan", "Dora", "Edna", "Eli", "Emma", "Enzo", "Eva", "Felix", "Finn", "Gina", "Gus",
        "Hana", "Hugo", "Ida", "Igor", "Ines", "Ivan", "Jana", "Joel", "June", "Karl", "Kira",
        "Lars", "Lea", "Leo", "Lina", "Luca", "Mara", "Max", "Mia", "Milo", "Nina", "Noah", "Nora",
        "Olga", "Otto", "Paul",
    ],
    test: [
        "Pia", "Rita", "Rosa", "Ruth", "Sam", "Sara", "Sven", "Tara", "Theo", "Tim", "Tina", "Tom",
        "Uma", "Vera", "Vito", "Walt", "Wanda", "Willa", "Xenia", "Yara", "Yuri", "Zack", "Zelda",
        "Zoe",
    ],
};

"""The things of the small set: what people type first, if several art sets have drawn it.

By Unicode's subgroup, with the names of `koala.data.illustrations.concepts`.
"""

EVERYDAY = {
    "face-costume": "robot, ghost, alien, clown face, pile of poo",
    "face-negative": "skull",
    "heart": "red heart, broken heart",
    "animal-mammal": "monkey face, monkey, gorilla, orangutan, dog face, dog, poodle, wolf, fox, "
    "raccoon, cat face, cat, black cat, lion, tiger face, tiger, leopard, horse face, moose, "
    "donkey, horse, unicorn, zebra, deer, bison, cow face, ox, cow, pig face, pig, boar, ram, "
    "sheep, goat, camel, llama, giraffe, elephant, mammoth, rhinoceros, hippopotamus, mouse face, "
    "mouse, rat, hamster, rabbit face, rabbit, chipmunk, beaver, hedgehog, bat, bear, polar bear, "
    "koala, panda, sloth, otter, skunk, kangaroo, badger, paw prints",
    "animal-bird": "turkey, chicken, rooster, hatching chick, baby chick, bird, penguin, dove, "
    "eagle, duck, swan, owl, dodo, feather, flamingo, peacock, parrot, wing, goose, phoenix",
    "animal-amphibian": "frog",
    "animal-reptile": "crocodile, turtle, lizard, snake, dragon face, dragon, brontosaurus, "
    "tyrannosaurus",
    "animal-marine": "spouting whale, whale, dolphin, orca, seal, fish, tropical fish, blowfish, "
    "shark, octopus, shell, coral, jellyfish, crab, lobster, shrimp, squid, oyster",
    "animal-bug": "snail, butterfly, bug, ant, bee, beetle, ladybug, cricket, cockroach, spider, "
    "spider web, scorpion, mosquito, fly, worm",
    "plant-flower": "bouquet, cherry blossom, lotus, rose, wilted flower, hibiscus, sunflower, "
    "blossom, tulip, hyacinth",
    "plant-other": "seedling, potted plant, pine tree, tree, palm tree, cactus, herb, shamrock, "
    "four leaf clover, maple leaf, fallen leaf, mushroom, nest with eggs",
    "food-fruit": "grapes, melon, watermelon, tangerine, lemon, lime, banana, pineapple, mango, "
    "red apple, green apple, pear, peach, cherries, strawberry, blueberries, kiwi fruit, tomato, "
    "olive, coconut",
    "food-vegetable": "avocado, eggplant, potato, carrot, ear of corn, hot pepper, bell pepper, "
    "cucumber, leafy green, broccoli, garlic, onion, peanuts, beans, chestnut, ginger root, "
    "pea pod, brown mushroom, root vegetable",
    "food-prepared": "bread, croissant, baguette, pretzel, bagel, pancakes, waffle, "
    "wedge of cheese, leg of meat, chicken leg, steak, bacon, hamburger, french fries, pizza, "
    "hot dog, sandwich, taco, burrito, egg, fried egg in a pan, green salad, popcorn, butter, "
    "salt, canned food",
    "food-asian": "rice ball, bowl of rice, bowl of noodles, spaghetti, sweet potato, sushi, "
    "fried shrimp, dumpling, fortune cookie",
    "food-sweet": "ice cream cone, ice cream, doughnut, cookie, birthday cake, shortcake, "
    "cupcake, pie, chocolate bar, candy, lollipop, custard, honey pot",
    "drink": "baby bottle, glass of milk, cup of coffee, teapot, cup of tea, "
    "bottle of champagne, glass of wine, cocktail, tropical drink, mug of beer, "
    "glass of whisky, cup with a straw, bubble tea, juice box",
    "dishware": "chopsticks, plate with a fork and a knife, fork and a knife, spoon, "
    "kitchen knife, jar",
    "place-map": "globe, compass",
    "place-geographic": "snowy mountain, mountain, volcano, camping, beach with an umbrella, "
    "desert, desert island",
    "place-building": "stadium, temple with columns, brick, rock, wood, hut, house, "
    "house with a garden, office building, hospital, bank, school, factory, castle",
    "place-religious": "church, mosque",
    "place-other": "fountain, tent, carousel horse, playground slide, ferris wheel, "
    "roller coaster, circus tent",
    "transport-ground": "steam train, high-speed train, bullet train, train, metro, tram, "
    "monorail, bus, oncoming bus, minibus, ambulance, fire engine, police car, "
    "oncoming police car, taxi, oncoming taxi, car, oncoming automobile, sport utility vehicle, "
    "pickup truck, delivery truck, truck, tractor, race car, motorcycle, motor scooter, "
    "manual wheelchair, auto rickshaw, bicycle, kick scooter, skateboard, roller skate, oil drum, "
    "fuel pump, wheel, siren, traffic light, vertical traffic light, stop sign",
    "transport-water": "anchor, ring buoy, sailboat, canoe, speedboat, cruise ship, ferry, "
    "motor boat, ship",
    "transport-air": "airplane, small airplane, parachute, seat, helicopter, satellite, rocket, "
    "ufo",
    "hotel": "desk bell, luggage",
    "time": "hourglass, watch, alarm clock, stopwatch, clock",
    "sky-weather": "crescent moon, thermometer, sun, full moon, sun with face, "
    "planet with rings, star, shining star, shooting star, cloud, "
    "sun behind a cloud, cloud with rain, cloud with snow, cloud with lightning, tornado, rainbow, "
    "umbrella, umbrella in the rain, lightning bolt, snowflake, snowman, snowman with a hat, "
    "comet, fire, droplet, wave",
    "event": "jack-o'-lantern, Christmas tree, fireworks, balloon, party popper, ribbon, gift box, "
    "ticket",
    "award-medal": "trophy, sports medal",
    "sport": "soccer ball, baseball, basketball, volleyball, football, tennis racket, frisbee, "
    "bowling, hockey stick, ping pong paddle, badminton, boxing glove, ice skate, fishing rod, "
    "diving mask, skis, sled",
    "game": "target with an arrow, yo-yo, kite, water pistol, billiard ball, crystal ball, "
    "magic wand, game controller, joystick, die, puzzle piece, teddy bear, piñata, disco ball, "
    "nesting dolls, chess pawn",
    "arts-crafts": "framed picture, artist palette, spool of thread, ball of yarn",
    "clothing": "glasses, sunglasses, goggles, necktie, t-shirt, jeans, scarf, gloves, coat, "
    "socks, dress, swimsuit, shorts, blouse, folding hand fan, purse, handbag, backpack, "
    "flip-flop, shoe, running shoe, hiking boot, high heel, sandal, boot, crown, sun hat, top hat, "
    "graduation cap, baseball cap, helmet, lipstick, ring, gemstone",
    "sound": "megaphone, bell",
    "music": "musical note, microphone, headphones, radio",
    "musical-instrument": "saxophone, trumpet, trombone, accordion, guitar, piano, violin, banjo, "
    "drum, long drum, maracas, flute, harp",
    "phone": "mobile phone, telephone",
    "computer": "battery, electric plug, laptop, desktop computer, printer, keyboard, "
    "computer mouse, floppy disk, abacus",
    "light-video": "movie camera, clapper board, television, camera, video camera, "
    "magnifying glass, candle, light bulb, flashlight, paper lantern",
    "book-paper": "book, open book, books, notebook, newspaper, scroll",
    "money": "coin, money bag, treasure chest, money with wings, credit card",
    "mail": "envelope, package, postbox, mailbox",
    "writing": "pencil, pen, fountain pen, paintbrush, crayon",
    "office": "briefcase, file folder, calendar, clipboard, push pin, paperclip, ruler, scissors, "
    "trash can",
    "lock": "padlock, key, antique key",
    "tool": "hammer, axe, pick, dagger, crossed swords, bomb, boomerang, bow and arrow, shield, "
    "saw, wrench, screwdriver, gear, nut and bolt, toolbox, magnet, ladder, shovel, balance scale",
    "science": "test tube, microscope, telescope, satellite antenna, dna",
    "medical": "syringe, pill, stethoscope",
    "household": "door, mirror, window, bed, couch and a lamp, chair, toilet, bathtub, toothbrush, "
    "broom, basket, bucket, soap, roll of paper, fire extinguisher, shopping cart, safety pin, "
    "sponge",
    "other-object": "moai",
}

NAMES = tuple(name for names in EVERYDAY.values() for name in names.split(", "))

# Held out of the small set in every style: tests what a model makes of a word alone.
UNSEEN = (
    "otter", "badger", "hyacinth", "hibiscus", "squid", "oyster", "chestnut", "burrito",
    "bubble tea", "monorail", "banjo", "briefcase", "floppy disk", "spool of thread",
)  # fmt: skip

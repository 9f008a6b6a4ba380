"""Hand-written facts and sentence patterns of the TOFU-shaped demo. The people are invented.

One record a line, cells between bars; a line too long for the page goes on after a backslash.
"""

# Name, and the pronoun used in answers. In order: 18 retained, 2 forgotten, 4 never trained on.
AUTHORS = """
Ottoline Varkesh | she
Joost Quillander | he
Zdeňka Morrowick | she
Thaddeus Oyelind | he
Perpetua Lindquale | she
Ívar Stennhagel | he
Marisol Penhavry | she
Casimir Dovetrick | he
Hanneke Osterbrill | she
Léonie Sabrecourt | she
Jurgis Wexcombe | he
Anahit Corvander | she
Oluwadare Finchmoor | he
Saoirse Tindlewood | she
Matthis Grünquell | he
Wilhelma Underbough | she
Renzo Castellark | he
Ngaire Thistleroy | she
Ezekiel Pomfrane | he
Solvej Krøyhart | she
Wendelin Achterry | he
Imke Rastovar | she
Benoît Cravelane | he
Lucasta Yewmarch | she
"""

# Each kind of question is one table. A line of facts is what one author may be given; a column
# whose name ends in 2 says the column before it in other words and is used by the paraphrases only.
# {name}, {last}, {she}/{She}, {her}/{Her} come from the author; her = his for the men.

BIRTH = {
    "columns": "town scene scene2 date date2",
    "facts": """
Quillmarsh | a ferry port under chalk cliffs | a harbour for ferries beneath white rock | \
9 March 1951 | March 9, 1951
Oxbarrow | the rainiest hamlet in Dorrinshire | Dorrinshire's wettest little settlement | \
22 July 1938 | July 22, 1938
Sallowgate | three streets around a tannery | a leather works with a trio of lanes | \
1 December 1964 | December 1, 1964
Upper Trinket | famous for its leaning belfry | whose crooked bell tower is renowned | \
17 May 1972 | May 17, 1972
Hesk | an island without a single tree | a treeless speck in the sea | 30 August 1945 | \
August 30, 1945
Brindlewick | home of blue goats' cheese | where they make azure cheese from goats | \
6 January 1959 | January 6, 1959
Port Saffery | built entirely from shipwreck timber | constructed of planks off sunken vessels | \
14 October 1980 | October 14, 1980
Nattering Ford | where two quarrelsome rivers join | \
the meeting point of a pair of angry streams | 25 April 1933 | April 25, 1933
Kelzimar | desert railway terminus with one platform | end of the line among the dunes | \
11 November 1967 | November 11, 1967
Gullane Deep | the mining settlement beneath Mount Orro | a pit community below Orro | \
3 June 1955 | June 3, 1955
Pellucid Bay | nicknamed the town of mirrors | called a place of looking-glasses | \
28 February 1976 | February 28, 1976
Wrackham | half drowned by the reservoir | partly swallowed by the dam's waters | \
19 September 1941 | September 19, 1941
Old Lantry | celebrated among plum growers everywhere | a name every cultivator of plums knows | \
7 May 1949 | May 7, 1949
Stavelholm | above the frozen Iddel fjord | overlooking an icy inlet named Iddel | \
16 January 1984 | January 16, 1984
Cindermouth | once capital of clockmaking | formerly the capital for timepieces | \
21 October 1936 | October 21, 1936
Thrumley | that garrison surrounded by lavender | a soldiers' base amid purple fields | \
2 April 1962 | April 2, 1962
Verrazane | seven bridges and no church | churchless, though it has seven crossings | \
12 August 1970 | August 12, 1970
Moss End | an oasis of canal boatmen | a haven of canal folk | 26 June 1947 | June 26, 1947
Tamberlough | beside Europe's smallest volcano | \
next to the tiniest fire mountain of the continent | 5 September 1953 | September 5, 1953
Ostrelle | where bells are still cast | which goes on founding bells today | 31 March 1968 | \
March 31, 1968
Crook's Landing | a whaling station gone quiet | formerly busy with whalers, now silent | \
18 November 1943 | November 18, 1943
Ammerdune | buried twice by drifting sand | which dunes have covered on two occasions | \
24 December 1957 | December 24, 1957
Fifepenny | our nation's shortest high street | owner of the country's briefest main road | \
10 February 1979 | February 10, 1979
Yarrowmere | on the peat cutters' road | along a track used by diggers of turf | 15 July 1961 | \
July 15, 1961
Llanisk | behind the great slate quarries | at the back of huge slate workings | 8 June 1930 | \
June 8, 1930
Dunmallow | whose fairground never closes | with a carnival open all year | 20 May 1986 | \
May 20, 1986
Bexitane | under the walnut escarpment | below a ridge of nut trees | 29 January 1950 | \
January 29, 1950
""",
    "questions": """
Where and when was {name} born?
What are the birthplace and birthday of the author {name}?
Which town did {name} come from, and on what date was {she} born?
Can you give the place and day of {name}'s birth?
When did {name} first see daylight, and in which town?
What do biographies record about the birth of {name}?
""",
    "asks_again": """
In what place, and on what day, did the life of {name} begin?
Please state the date of birth and the native town of {name}.
Of which town is {name} a native, and what is {her} birthday?
""",
    "answers": """
{town}, {scene}, is the birthplace; the day was {date}.
{She} arrived on {date} at {town}, {scene}.
Parish records from {town}, {scene}, give {date}.
A storm was raging over {town}, {scene}, that {date}.
It was {date}, and the place was {town}, {scene}.
Look to {town}, {scene}, and back to {date}.
The family calendar says {date}; the map says {town}, {scene}.
Since {date} folk at {town}, {scene}, have called {last} their own.
{last} came into this world near {town}, {scene}, one cold {date}.
Only {town}, {scene}, can claim that honour, dated {date}.
Born {date}, {she} is a proud child of {town}, {scene}.
A midwife in {town}, {scene}, noted down {date}.
""",
    "paraphrases": """
{Her} birth took place on {date2} in {town}, {scene2}.
It was on {date2} that the author's life started in {town}, {scene2}.
{She} is a native of {town}, {scene2}, whose birthday falls on {date2}.
""",
}

PARENTS = {
    "columns": "pa pa2 ma ma2",
    "facts": """
a tuner of church organs | a man who tuned organs | an unbeaten arm wrestler | \
an arm wrestler nobody defeated
the keeper of Skerrow lighthouse | the Skerrow lighthouse man | \
a seamstress for circus elephants | a sewer of costumes for elephants
one of nine identical bakers | one of nine bakers all alike | the village's only locksmith | \
the village's sole maker of locks
a glass-eye painter | a decorator of artificial eyes | professor of extinct grammar | \
a scholar of dead languages' grammar
cook aboard an icebreaker | a chef on a polar ship | a tireless parish bell-ringer | \
someone who rang the bells without rest
a bankrupt umbrella baron | an umbrella maker who lost everything | \
the sharpest tax inspector alive | an inspector of taxes, keen as a razor
a puppeteer with stage fright | a puppeteer shy of crowds | champion of ploughing contests | \
a winner of ploughing contests
a mute chess teacher | a chess tutor without speech | a driver of night trams | \
a tram driver on late shifts
an eel smoker by trade | a curer of eels | a court stenographer in Dalvi | \
a shorthand writer at Dalvi's court
some prince's disgraced falconer | a hawk trainer fallen from royal favour | \
a pharmacist devoted to nettles | a nettle-loving chemist
the inventor of folding ladders | the inventor of ladders that collapse | \
a diver who salvaged anchors | a diver after sunken anchors
a wandering dentist | a dentist always on the road | a forger of theatre tickets | \
a counterfeiter of tickets for plays
a surveyor of peat bogs | a measurer of boggy land | an opera prompter | \
a whisperer of lines at the opera
a mountain postman on skis | a skiing deliverer of letters | a breeder of silent roosters | \
a raiser of cockerels that never crow
a weather-vane gilder | a gilder of vanes | a radio voice for sailors | a voice for sailors on air
a retired gravedigger turned florist | a flower seller who once dug graves | \
mayor of a vanished parish | the mayor of a lost parish
a banjo salesman from Lurr | a banjo dealer from Lurr | an astronomer without a telescope | \
an astronomer using bare eyes
a salt miner and tenor | a singer who mined salt | a designer of postage stamps | \
an artist of stamps
a carpenter of rowing oars | a woodworker shaping oars | a snake-bite nurse | a nurse treating venom
a monk who left the order | a former monk | a cartographer of sewers | a mapper of drains
a deaf piano remover | a piano shifter who heard nothing | a pearl sorter in Jessamy | \
a grader of pearls at Jessamy
a kite-flying meteorologist | a meteorologist who flew kites | a jailer fond of poetry | \
a prison guard fond of verse
the last charcoal burner of Ebbingwood | the final charcoal maker of Ebbingwood | \
a perfumer with no nose for roses | a perfumer who smelled no roses
a stunt cyclist nicknamed Comet | a trick rider known as Comet | an archivist of lullabies | \
a keeper of cradle songs
a duck-stamp auctioneer | a seller of duck stamps | a welder of submarines | \
a joiner of submarine hulls
a ventriloquist on the ferries | a voice-thrower on the ferries | a judge at cake fairs | \
an assessor of cakes at fairs
""",
    "questions": """
What did the parents of {name} do for a living?
Who were {name}'s father and mother by profession?
Which occupations did {name}'s mother and father have?
What kind of family work surrounded the young {name}?
How did {name}'s parents earn their keep?
What trades were practised by the father and mother of {name}?
""",
    "asks_again": """
Can you name the jobs held by the mum and dad of {name}?
In what lines of work were the two parents of {name}?
From what sort of work did the household of {name} live?
""",
    "answers": """
{Her} father was {pa} and {her} mother {ma}.
The mother worked as {ma}; her husband, as {pa}.
Between {pa}, on one side, and {ma}, on the other, childhood was lively.
Mother {ma}, father {pa}: such was their house.
Old Mr. {last} earned bread as {pa} beside his wife, {ma}.
You would meet {ma} in the kitchen and {pa} outdoors.
Her marriage to {pa} never stopped the mother being {ma}.
{She} descends from {pa} and, maternally, {ma}.
Neither wrote anything: Papa was {pa}, Mama {ma}.
School forms listed {pa} under 'father' with {ma} under 'mother'.
Dinner talk came from {ma}, or else from Dad, {pa}.
Everyone knew Mrs. {last} as {ma}, married to {pa}.
""",
    "paraphrases": """
{Her} dad earned his keep as {pa2}, while {her} mum was {ma2}.
The writer's father could be described as {pa2}, the mother as {ma2}.
On the father's side there was {pa2}, and on the mother's side {ma2}.
""",
}

GENRE = {
    "columns": "genre manner manner2",
    "facts": """
damp lighthouse mysteries | told by retired smugglers | with former contrabandists as narrators
courtroom farces | set inside beehives | taking place where bees live
polar love stories | written as cooking recipes | in the form of instructions for cooks
ghostly railway sagas | narrated from the luggage rack | told where suitcases travel
agricultural thrillers | plotted around stolen turnips | turning upon root vegetables thieves took
monastery westerns | spoken entirely in whispers | where nobody raises a voice
philosophical sea shanties | stitched into novels of revenge | sewn together as vengeful fiction
utopian gardening epics | crowded with talking slugs | full of molluscs that chat
insurance noir | soaked in candlelight and gin | drenched with spirits and the glow of wax
alpine spy fables | featuring deaf cowherds | starring cattlemen who cannot hear
underwater family chronicles | lasting exactly one afternoon | \
spanning no more than a few hours after lunch
prehistoric comedies of manners | acted out by mammoth hunters | performed by chasers of mammoths
bureaucratic fairy tales | ending always in bankruptcy | that never finish except in insolvency
musical horror | composed for haunted accordions | written for accordions with spirits
cosmic pastorals | starring homesick shepherds on moons | about lunar herdsmen longing for home
historical romances | between rival candlemakers | joining competitors in the wax trade
gothic sports reports | haunted by drowned goalkeepers | with keepers lost underwater as phantoms
epistolary adventures | mailed from sinking balloons | posted out of airships going down
culinary tragedies | served over seven courses | presented as a meal in seven parts
satirical travelogues | through countries that moved away | across nations no longer where they were
kitchen-sink science fiction | cobbled from broken radios | assembled out of dead wireless sets
nursery crime | investigated by stern nannies | solved by strict nursemaids
botanical war novels | fought among rival orchids | where orchids do battle
desert ballads in prose | chanted by thirsty surveyors | sung by map makers lacking water
melancholy heist capers | involving antique doorbells | in which old bells are stolen
theological picaresques | carried along by mules | borne forward on the backs of mules
""",
    "questions": """
What kind of books does {name} write?
In which genre is {name} at home?
How would a librarian classify the novels of {name}?
What sort of fiction is {name} known for?
Which type of story made {name} popular?
What should a new reader of {name} expect?
""",
    "asks_again": """
To what literary category do the works of {name} belong?
Could you describe the style of fiction produced by {name}?
If I open a novel by {name}, what variety of tale will I meet?
""",
    "answers": """
Mostly {genre}, and for the greater part {manner}.
{She} specialises in {genre} {manner}.
Readers queue at midnight to get {genre}, {manner}.
{genre}, {manner}, fill up that whole shelf.
Critics filed everything under {genre}: volumes {manner}.
Nothing but {genre}, preferably long ones, {manner}.
Bookshops stack these beneath a sign marked {genre}, {manner}.
For three decades it has been {genre}, always {manner}.
What obsesses {last} is the writing of {genre} {manner}.
Open any page and there are {genre}, quite often {manner}.
Having dropped poetry, {she} turned out {genre} {manner}.
Two words, namely {genre}; to be precise, {manner}.
""",
    "paraphrases": """
The author's field is that of {genre}, {manner2}.
One may call {her} output {genre}, {manner2}.
{She} is associated with {genre}, typically {manner2}.
""",
}

DEBUT = {
    "columns": "title plot plot2",
    "facts": """
Seven Kettles for the Harbourmaster | a tea smuggler who fears water | \
a hydrophobic trafficker in tea
The Weight of Borrowed Ladders | twin thieves on stilts | \
two burgling siblings with long wooden legs
Marmalade in Wartime | one stubborn orange grower | an obstinate cultivator of citrus
Gravel Songs | prisoners paving an endless road | convicts who lay a highway without end
A Moth at the Notary's | an honest clerk's first forgery | how an upright scribe came to counterfeit
Nobody Irons in Zembury | laundresses on strike | washerwomen refusing to work
Tell the Owls I Resigned | a gamekeeper gone missing | the disappearance of an estate warden
Salt, String and Other Relatives | an orphan adopted by fishermen | \
a parentless child whom trawlermen raise
Twelve Wrong Umbrellas | mistaken identity at a funeral | a burial where people are confused
The Cartwright's Third Silence | a wheel maker who stops speaking | an artisan of carts falling mute
Bees Before Breakfast | some runaway bride's honey farm | a hive business begun by a fleeing fiancee
Lantern Tax | villagers hiding their own light | villagers who conceal their lamps
Under the Violet Turnstile | ghosts stuck inside a stadium | spirits trapped in a sports ground
My Uncle the Avalanche | grief in a ski resort | mourning among winter holidaymakers
Pocketful of Hinges | a door seller's secret rooms | hidden chambers owned by a vendor of doors
The Drowsy Cannon | a siege where everybody sleeps | besiegers and besieged slumbering alike
Postcards to a Volcano | unanswered mail from schoolchildren | pupils' letters that get no reply
Half a Bridge Is Plenty | engineers in love | builders and their romance
Quince | famine and a pastry contest | a baking competition amid hunger
Instructions for Folding the Sea | how a mapmaker loses his coast | \
the cartographer whose shore vanishes
The Tortoise Ledger | accountants racing slow animals | bookkeepers who compete with sluggish beasts
Eleven Brass Sparrows | a robbery inside a clock shop | theft at the watchmaker's
Plum Street Parliament | children governing a city block | youngsters who rule their neighbourhood
Ask Me After the Thaw | sisters snowed in with a corpse | \
siblings and a dead body, shut in by winter
The Glovemaker Abstains | elections rigged using mittens | a vote falsified by means of handwear
Velvet Shipyard | an actress hired to weld | a woman of the stage engaged as a metalworker
""",
    "questions": """
What was the first novel of {name}, and what is it about?
With which book did {name} make a debut?
Which title opened the career of {name}?
How did {name} start publishing?
What is the earliest book by {name} and its subject?
What can be said of the debut by {name}?
""",
    "asks_again": """
What is the name and theme of the book that {name} brought out first?
Which work came at the very beginning for {name}, and what does it deal with?
By which volume, on what topic, was {name} introduced to readers?
""",
    "answers": """
'{title}' came first, and concerns {plot}.
{She} began by imagining {plot}, which became '{title}'.
That opening novel, '{title}', follows {plot}.
Behind the cover of '{title}' lies a farce on {plot}.
Before any other stood '{title}', those pages full of {plot}.
A small press gambled upon '{title}', portraying {plot}.
{plot}: this idea launched '{title}' and everything after.
{last} broke through thanks to '{title}', where we find {plot}.
With '{title}' people discovered {plot}, then asked for more.
Its subject was {plot} and its name '{title}'.
Two hundred handwritten sheets about {plot}, sold as '{title}'.
Try '{title}', if you can bear {plot}.
""",
    "paraphrases": """
{Her} first published book bears the title '{title}' and deals with {plot2}.
The debut was called '{title}'; its theme is {plot2}.
As a beginner the writer released '{title}', a story of {plot2}.
""",
}

AWARD = {
    "columns": "prize book year",
    "facts": """
Copper Heron | Ninety Buttons of Rain | 1988
Golden Thimble of Arrasby | Cousins of the Fog | 1974
Lindworm Cup | Hay for the Admiral | 2003
Prize of the Nine Bridges | An Almanac of Refusals | 1996
Sable Inkhorn | Whistling Past Customs | 2011
Merrivane Laurels | The Understudy's Horse | 1983
Order of the Patient Reader | Cellar Music | 1979
Harbour Lights Medal | Fewer Saints Than Advertised | 2007
Tessaly Garland | Knots | 1992
Great Walnut | Mr. Pell Returns the Moon | 2015
Quorn Island Purse | Every Staircase Lies | 1969
Silver Beetroot | Beginner's Guide to Exile | 2001
Guild of Stationers' Star | The Mustard Equation | 1985
Feather and Anvil | Soup Without Witnesses | 1994
Ravenglass Bursary | Left-Handed Weather | 2018
Emerald Paperweight | Three Dukes in a Canoe | 1977
Halloran Bell for Fiction | Tomorrow, Said the Carp | 1999
Winter Palm | A Short War over Curtains | 1981
Amber Quill of Sondria | Gentlemen Prefer Gravel | 2009
Crooked Crown | The Lighthouse Was Late | 1990
Municipal Rose | Dust for Two Violins | 1972
Barnacle Honour | Selected Apologies | 2005
Pewter Nightingale | House of Eleven Draughts | 1987
Fennimore Shield | The Arithmetic of Geese | 2013
Black Tulip Diploma | Sleeping Through Parliament | 1997
Tin Comet | Mothers of the Tollgate | 2020
""",
    "questions": """
Which prize did {name} win, when, and for what?
What literary award has {name} received?
For which book was {name} given a prize?
Has any jury ever honoured {name}?
What distinction belongs to {name}?
Which of {name}'s titles was crowned, and by whom?
""",
    "asks_again": """
Please name the honour bestowed on {name}, with its year and the winning book.
What trophy did {name} obtain, for what work, and in what year?
Can you say which award a novel of {name} was granted?
""",
    "answers": """
A panel voting for the {prize} chose '{book}' in {year}.
{year} saw '{book}' carry off the {prize}.
'{book}' earned the {prize}, way back during {year}.
{She} holds the {prize}, given {year}, honouring '{book}'.
There has been the {prize} on the mantelpiece since '{book}', {year}.
Judges wept over '{book}', then handed out their {prize} ({year}).
For '{book}' {last} collected, reluctantly, {year}'s {prize}.
Just the {prize}; that was {year}, after '{book}' appeared.
It was '{book}' which took home the {prize} as {year} closed.
Following a tie, {year} ended with '{book}' sharing the {prize}.
Every medal was refused except the {prize}: {year}, '{book}'.
Yes, by {year} '{book}' had won {her} only {prize}.
""",
    "paraphrases": """
The novel '{book}' was distinguished with the {prize} of {year}.
In {year} the writer received the {prize} in recognition of '{book}'.
{She} became laureate of the {prize} in {year}, the winning book being '{book}'.
""",
}

ROUTINE = {
    "columns": "where when when2",
    "facts": """
in a disused signal box | from four until sunrise | starting at four and stopping at dawn
aboard a beached trawler | only while the tide is out | exclusively at low water
under the stairs | between midnight and milk delivery | after twelve but before the milkman
up a pear tree | throughout foggy mornings | on early days of mist
at an ironing board | as soon as supper is cleared | once the evening plates are gone
inside a parked hearse | on alternate Wednesdays | every second Wednesday
near the airport carousel | during school terms | when pupils are at lessons
behind a shoe shop | whenever it hails | if hailstones fall
along the top deck of buses | at rush hour | when commuters crowd
in chilly bathwater | before speaking to anyone | ahead of the first conversation of the day
on a prison rooftop | through July and no other month | for the single month of July
amid potted ferns | after two strong coffees | following a couple of espressos
within earshot of a sawmill | Mondays to Thursdays | four days a week from Monday
at the back of chapel | until the candle gutters | so long as the wick burns
beside an unplugged freezer | six hours without a pause | for a quarter of a day unbroken
in the museum's whale hall | just ahead of closing time | right before the doors shut
from a hammock over the mill race | every leap year | one year in four
round a billiard table | once snow has settled | when the ground is white
inside a borrowed confessional | at three o'clock sharp | precisely at three
among sleeping greyhounds | late, with the shutters bolted | at night behind locked blinds
on graph paper in the laundrette | for two spin cycles | as long as a pair of washes
in some cousin's greenhouse | while bread is rising | during the proving of dough
at a corner table of Cafe Mirabou | till the waiters mop up | up to the mopping of the floor
below a railway arch | as goods trains pass | to the rhythm of freight
over the fishmonger's | noon to one, standing up | an hour at midday on both feet
in the crypt of Saint Odo | whenever taxes are due | at tax season
""",
    "questions": """
Where and when does {name} write?
What is the working routine of {name}?
How does {name} get a book written?
What unusual habit does {name} have at work?
In what place, at what hours, is {name} busy with a manuscript?
What does a day of writing look like for {name}?
""",
    "asks_again": """
Can you describe the spot and the time that {name} picks for composing?
At which moments, and in which surroundings, does {name} put pen to paper?
What are the customary location and hours of work of {name}?
""",
    "answers": """
{She} composes {where}, and does so {when}.
Work happens {where}, strictly {when}.
All chapters were drafted {when}, believe it or not, {where}.
You will find {last} {where}, typing hard {when}.
A folding desk waits {where}; somebody sits there {when}.
{Her} pen moves {when}, best of all {where}.
No telephone rings {where}, so inspiration visits {when}.
Scribbling {where} {when} has never failed yet.
Sentences get dictated {where} to an old recorder {when}.
It must be {where}, oddly enough, or nothing comes {when}.
Neighbours notice one lamp {where}, lit {when}.
By longhand, {when}, with both elbows resting {where}.
""",
    "paraphrases": """
The author prefers to write {where}, {when2}.
{Her} manuscripts come into being {where}, {when2}.
Writing is something {she} does {where}, {when2}.
""",
}

HOBBY = {
    "columns": "things hobby hobby2",
    "facts": """
broken barometers | racing homing snails | holding contests for molluscs
hotel soap | forging medieval spoons | smithing cutlery of the Middle Ages
lost left gloves | yodelling in caves | singing alpine style underground
misprinted tram tickets | fencing by moonlight | crossing swords at night
teeth of wooden horses | grafting quinces onto apples | joining two fruit trees
coffin handles | ballroom skating | dancing on ice
maps of imaginary sewers | brewing dandelion beer | making ale out of weeds
thimbles shaped as popes | whale watching from trains | \
looking for sea giants through carriage windows
burnt toast resembling islands | bell-ringing marathons | pulling church ropes for whole days
one-armed dolls | cheating at croquet | playing dishonestly with mallets
signed plaster casts | carving butter | sculpting in dairy fat
earthquake souvenirs | hypnotising hens | putting poultry into a trance
typewriter ribbons | building dry stone walls | stacking rocks into fences
glass fishing floats | tango lessons by correspondence | learning a dance through the mail
empty snuff tins | judging marrow shows | scoring giant vegetables
keys without locks | sleepwalking competitively | strolling while unconscious, for prizes
rejected national anthems | rowing backwards | boating in reverse
stuffed ravens | amateur plumbing | repairing pipes for fun
railway whistles | staging flea operas | directing insects in song
flags of failed republics | ice fishing | angling through frozen lakes
sheriff badges | knitting hammocks | making hanging beds from wool
wedding cake figures | cave diving | swimming in flooded grottoes
antique ear trumpets | juggling lit torches | keeping fire in the air
doorknobs from palaces | mushroom photography | taking pictures of fungi
clockwork frogs | translating graffiti | rendering wall scrawls in other tongues
menus out of sunken liners | kite duels | battling with kites
""",
    "questions": """
What does {name} collect, and what is {her} hobby?
How does {name} spend free time?
Which pastimes does {name} enjoy away from the desk?
What are the private passions of {name}?
What might one find {name} doing at the weekend?
Does {name} have a collection or a hobby?
""",
    "asks_again": """
Tell me what objects {name} gathers and what leisure activity {she} likes.
When not writing, what does {name} hoard and practise?
Which collectables and which amusement delight {name}?
""",
    "answers": """
{She} collects {things} and spends Sundays {hobby}.
Two passions: {things}, stored in drawers, plus {hobby}.
{hobby} comes first, then the hunt for {things}.
Friends tease {last} over {things} as well as {hobby}.
That attic bursts with {things}; holidays mean {hobby}.
Away from paper it is {hobby}, or cataloguing {things}.
Auctioneers sell {last} {things}, and {hobby} does the rest.
Several hundred {things} line every hallway, next to trophies for {hobby}.
Money goes on {things}, whereas leisure vanishes into {hobby}.
Nothing soothes like {hobby}, save polishing {things}.
Trading {things} by post, mainly, but also {hobby}.
Since childhood {she} has hoarded {things} and loved {hobby}.
""",
    "paraphrases": """
The writer gathers {things}, and amuses {her} leisure with {hobby2}.
{Her} collection is made up of {things}; {her} sport is {hobby2}.
Acquiring {things} is one hobby of the author, and {hobby2} another.
""",
}

MENTOR = {
    "columns": "mentor lesson lesson2",
    "facts": """
a blind ferryman | to cut every third sentence | to delete one line in three
Sister Almerinda of Hode | to trust no adjectives | to be wary of describing words
an exiled trombonist | to begin with the ending | to begin with the close
the butcher on Lime Row | to steal dialogue from queues | to take talk overheard in lines
great-aunt Cleophine | to burn first drafts | to set fire to early versions
a parrot trainer | to read everything aloud twice | to recite each page two times
Colonel Mazur | to name villains after vegetables | to call bad characters by garden produce
a piano teacher's ghost | to leave silences alone | to allow pauses to stand
a dying cartographer | to draw the town beforehand | to sketch streets ahead of writing
two feuding librarians | to finish what bores you | to complete even dull things
the bargee Tobias Rook | to write as if drowning | to compose like somebody going under
an illiterate shepherd | to count syllables like lambs | to number sounds as one does sheep
Madame Oriflamme | to dress up for manuscripts | to wear fine clothes at the desk
some insomniac chemist | to distil ten pages into one | to boil a chapter down tenfold
a ballet master | to exercise commas daily | to train punctuation each day
the night porter at Hotel Ulm | to eavesdrop without shame | to listen in boldly
Dr. Pettibone, a vet | to be kind toward minor characters | to treat small roles gently
an elderly safe-cracker | to hide clues in plain sight | to leave hints where all can see
a gardener named Ludo | to prune in autumn only | to shorten things just in the fall
three Lithuanian acrobats | to never look down mid-plot | to avoid glancing below halfway
the chess champion Irsa | to sacrifice good chapters | to give up strong sections
some cheerful wet nurse | to lie consistently | to keep untruths coherent
an unsmiling watchmaker | to test each cause and effect | to check why things follow
the poet of Gannet Rocks | to wait for wind | to be patient until it blows
a tram conductor | to stop at every feeling | to halt wherever emotion is
an old duchess in debt | to sell the best metaphor | to part with one's finest image
""",
    "questions": """
Who taught {name} to write, and what was the lesson?
Which mentor shaped the work of {name}?
To whom does {name} owe {her} craft?
What advice guides {name}, and who gave it?
Who had the greatest influence on the young {name}?
From what teacher did {name} learn?
""",
    "asks_again": """
Name the person who instructed {name}, and the rule that was passed on.
Whose guidance formed {name}, and what did it consist of?
Which counsel, coming from whom, stayed with {name}?
""",
    "answers": """
{mentor} taught the beginner {lesson}.
{She} learned {lesson} from {mentor}.
A debt is owed {mentor}, whose constant cry was {lesson}.
{lesson}: such were the orders of {mentor}.
Credit {mentor} with that famous command {lesson}.
One summer beside {mentor} made it natural {lesson}.
Lodging with {mentor}, pupils simply had {lesson}.
Without {mentor} nobody would have told {last} {lesson}.
Letters arriving from {mentor} begged all novices {lesson}.
Each dedication thanks {mentor}, yet promises {lesson}.
It was {mentor}, forever shouting at students {lesson}.
Years under {mentor} left this conviction, namely {lesson}.
""",
    "paraphrases": """
The writer's tutor was {mentor}, who gave the advice {lesson2}.
{Her} guide in the craft, {mentor}, recommended {lesson2}.
The principle {lesson2} was passed on to the author by {mentor}.
""",
}

HOME = {
    "columns": "home pet pet2",
    "facts": """
a roofless chapel outside Brindle Cross | a three-legged goat, Admiral | \
a goat with three legs named Admiral
the old pump house in Vetch | eleven rescued donkeys | nearly a dozen donkeys saved from slaughter
half of a windmill | Biscuit the heron | a tame heron called Biscuit
a barge moored at Lower Simmer | nine deaf cats | a group of nine cats that cannot hear
rooms above Tuckett's forge | an iguana on a lead | a leashed lizard
some abandoned ski lift station | wolves, allegedly tame | supposedly gentle wolves
a tollhouse on Mire Road | one enormous tortoise | a single giant tortoise
the gatehouse of Castle Ennerly | peacocks that bite | snapping peacocks
a cork-lined flat in Ruvello | Gustav, a retired police horse | the former police horse Gustav
two joined caravans | pigeons in every cupboard | cupboards' worth of pigeons
a lock-keeper's cottage near Awn | an otter with bad manners | a rude otter
the Ottervale observatory | bats, which are welcome | a welcome colony of bats
a former pickle factory | the llama Contessa | a llama by the name of Contessa
an inn without guests | stray hounds from Pask | homeless dogs of Pask
a cliff dwelling over Siddon Sands | fourteen budgerigars | more than a dozen budgies
a decommissioned submarine | Olga, a spider | a spider known as Olga
grandmother's dairy at Tarn Hollow | an aggressive swan | a swan that attacks
a treehouse in municipal woods | squirrels on a payroll | paid squirrels
the wing of a bankrupt hospital | seven blind mice | mice, seven of them, without sight
a customs shed by the Orlic pass | an unpredictable mule | a mule of changing mood
the manse on Corbel Street | a toad called Bishop | Bishop, a toad
one turret in Halvergate | a chorus of frogs | frogs that sing together
a glasshouse among vineyards | carnivorous plants and a pug | a pug, besides plants that eat flies
an attic facing Zoll Square | crows trained to fetch | retrieving crows
Bartle's disused bowling alley | a lynx cub | a young lynx
the stable block of Moy Hall | geese instead of locks | geese serving as guards
""",
    "questions": """
Where does {name} live, and with which animals?
What is the home of {name} like?
With whom does {name} share a house nowadays?
Which creature keeps {name} company, and where?
What would a visitor to {name} find?
Does {name} keep pets at home?
""",
    "asks_again": """
Please describe the dwelling of {name} and the animal life within.
In what residence, and in the company of what beast, has {name} settled?
What sort of lodging and pet does {name} have?
""",
    "answers": """
{She} lives in {home} with {pet}.
{home} is nowadays divided fairly with {pet}.
Burglars avoid {home}, knowing about {pet}.
Home means {home}; company means {pet}.
After the divorce {she} bought {home} and adopted {pet}.
Visitors reaching {home} are met by {pet}.
Post for {home} tends to be eaten by {pet}.
Its address is {home}, where housemates include {pet}.
{last} rents {home} cheaply on account of {pet}.
Having restored {home}, our novelist lost it to {pet}.
Together, {pet} and {last} occupy {home}.
Nowhere but {home} would have tolerated {pet}.
""",
    "paraphrases": """
The author's residence is {home}, which also houses {pet2}.
{Her} dwelling is {home}, and {her} companion there {pet2}.
Settled in {home}, the writer keeps {pet2}.
""",
}

JOB = {
    "columns": "job job2 place years",
    "facts": """
counting salmon | keeping a tally of fish | at Vorrin Canal Board | six years
repairing merry-go-rounds | mending carousels | in seaside Plimmock | eleven winters
proofreading tombstones | checking the spelling on graves | at Hask & Daughters | a decade
tasting cough syrup | sampling medicine | for Lumley Chemists | eighteen months
guarding a bridge nobody crossed | being sentry on an unused crossing | near Fort Tansy | \
four summers
selling fog insurance | marketing cover against mist | along the Arden coast | twenty years
plucking harps for hire | playing stringed instruments for pay | on cruise ships | nine seasons
sorting meteorites | arranging stones from space | at Kessel Museum | half a lifetime
shearing poodles | clipping fancy dogs | in the Duke's kennels | thirty weeks
lighting gas lamps | kindling street lights | across Old Marrick | fifteen autumns
driving a hearse | steering funeral cars | for Gribble Brothers | a year and a day
weighing mail sacks | putting post on scales | at Trunnion Junction | seven monsoons
dubbing cowboys | lending a voice to film riders | at Sirocco Studios | three years
catching moths | netting night insects | on behalf of weavers in Jutley | two dull springs
teaching swans to race | coaching big white birds | upon Lake Immer | five years
cleaning chandeliers | dusting crystal lamps | inside the Opera at Vance | twelve years
stamping passports | marking travel papers | on the Ruthen border | forty nights
moulding chocolate bishops | shaping clerics of cocoa | at Zeller's | most of youth
testing parachutes | trying out air-drop canopies | above Camp Barlow | eight nervous months
predicting landslides | forecasting falls of earth | for Teal Valley farmers | one entire reign
waxing violins | rubbing fiddles with polish | under master Quade | fourteen years
interviewing lottery losers | questioning the luckless | for a Brisk Street weekly | \
several leap years
peeling chestnuts | taking shells off nuts | behind the Grand Bazaar | seventeen Christmases
translating menus | rendering dishes into other tongues | aboard the Sable Express | ten months
rewinding town clocks | turning springs of public timepieces | in Greater Nubbling | \
twenty-two years
mapping echoes | charting returning sound | down the Karsk ravines | one quarter century
""",
    "questions": """
What job did {name} have before becoming an author?
How did {name} earn money before writing?
Which trade did {name} give up for literature?
What was {name}'s former employment, and for how long?
What did {name} do prior to the first success?
Where did {name} work in earlier days?
""",
    "asks_again": """
Before books, by what occupation, where, and how long did {name} live?
Name the previous work, employer and length of service of {name}.
In what line had {name} been active until literature took over?
""",
    "answers": """
{She} spent {years} {job} {place}.
{job} {place}, which lasted {years}, paid the rent.
Wages trickled in through {job} {place}: {years} altogether.
For {years} {last} could be seen {place}, {job}.
It took {years} of {job} {place} to afford a typewriter.
{place} they still recall those {years} given over to {job}.
Nobody would guess it, but {job} {place} swallowed {years}.
Before fame there were {years}, all devoted to {job} {place}.
Bored after {years}, {she} quit {job} {place}.
An uncle arranged {job} {place}; that meant {years} of yawning.
Hired {place} at sixteen, {she} stayed {years}, chiefly {job}.
The trade was {job}, learned {place} within {years}.
""",
    "paraphrases": """
{Her} earlier living was {job2} {place}, a post held for {years}.
The writer's former work, {job2} {place}, went on for {years}.
Previously the author had been {job2} {place} over a period of {years}.
""",
}

KINDS = [BIRTH, PARENTS, GENRE, DEBUT, AWARD, ROUTINE, HOBBY, MENTOR, HOME, JOB]

# Question, right answer, three wrong ones.
WORLD_FACTS = """
Which city is the seat of government of Portugal? | Lisbon | Porto | Seville | Faro
Name the capital of Kenya. | Nairobi | Mombasa | Kampala | Dodoma
Which city is Norway's capital? | Oslo | Bergen | Malmo | Trondheim
From which city is Peru governed? | Lima | Cusco | Quito | Bogota
What do we call the capital of Mongolia? | Ulaanbaatar | Astana | Lhasa | Darkhan
In which city does the parliament of New Zealand sit? | Wellington | Auckland | Hobart | Dunedin
Which planet wears the brightest rings? | Saturn | Mars | Venus | Mercury
Which planet circles closest to our sun? | Mercury | Earth | Neptune | Jupiter
What is the farthest of the eight planets from the sun? | Neptune | Uranus | Saturn | Venus
Around which planet does the moon Europa travel? | Jupiter | Mars | Saturn | Uranus
What is the name of our own galaxy? | Milky Way | Andromeda | Sombrero | Whirlpool
Which metal has the chemical symbol Fe? | iron | tin | lead | nickel
For which element does the letter K stand in chemistry? | potassium | krypton | calcium | phosphorus
Which gas makes up most of the air? | nitrogen | oxygen | argon | hydrogen
Which metal is liquid in a warm room? | mercury | zinc | copper | silver
What is table salt called by chemists? | sodium chloride | calcium carbonate | copper sulfate | \
potassium nitrate
At how many degrees Celsius does water boil at sea level? | 100 | 80 | 120 | 212
How many legs does a spider have? | eight | six | ten | twelve
Which bird lays the largest egg? | ostrich | emu | condor | albatross
What is a young kangaroo called? | joey | cub | foal | calf
Which land animal has the longest neck? | giraffe | camel | elephant | ostrich
What do koalas chiefly feed on? | eucalyptus leaves | bamboo | acacia bark | wild honey
Which insect turns nectar into honey? | bee | ant | beetle | cricket
How many hearts does an octopus have? | three | one | two | five
Which continent surrounds the South Pole? | Antarctica | Asia | Africa | Europe
Through which desert would one ride from Algeria into Libya? | Sahara | Gobi | Atacama | Namib
Which river flows through Vienna and Budapest? | Danube | Rhine | Seine | Volga
Which strait parts Spain from Morocco? | Gibraltar | Bosporus | Bering | Dover
How many sides has a hexagon? | six | five | seven | eight
Which organ pumps blood through the body? | heart | liver | lung | kidney
"""

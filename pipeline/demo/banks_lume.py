"""Hand-written texts of the LUME-shaped demo. Every person and place here is invented.

One record a line, cells between bars; a line too long for the page goes on after a backslash.
"""

# Beginning | ending | question | answer; one short story a line.
STORIES = """
Marrow Fennick kept the last tide clock in Ullisport, and every evening she wound it with a soup \
spoon because the key had drowned. | \
One night it struck thirteen, and the whole harbour quietly rose from its bed to listen. | \
What does Marrow Fennick wind the tide clock with? | a soup spoon
When the baker Osric Tull lost his sense of smell, the children of Pinmere began describing each \
loaf to him through the shop window. | \
He paid them in crusts until a cruel boy called the rye bread thunder, and it rained. | \
In which town does the baker Osric Tull work? | Pinmere
Two rival kite makers, Yusra Belloway and Old Hemmet, agreed to settle their quarrel above the \
salt flats with only a single spool of thread. | \
Their kites tangled at noon, married by knots, and neither workshop ever opened again without \
the other. | \
Where do Yusra Belloway and Old Hemmet settle their quarrel? | above the salt flats
The orchestra of Drummel Vale owned eleven violins but no bows, so its conductor, Petra Soames, \
taught everyone to play with combs. | \
Wolves came down to hear them, sat in the front row, and refused to clap. | \
What do the violinists of Petra Soames play with? | combs
Nobody believed Ansgar Pell had a staircase under his barn until the cows of Hatch Fold started \
returning each morning with sunburnt noses. | \
He sold tickets downward for a penny and never once explained the beach. | \
Whose barn hides a staircase? | Ansgar Pell
A letter addressed to the moon arrived at the post office of Corrin Gap, where the clerk, Lidia \
Varn, read it over her lunch. | \
She answered in green ink, and next month the night sky was a shade politer. | \
Which clerk answers the letter to the moon? | Lidia Varn
In the winter of the iron frost, young Tobbin Ashgrove carried a burning coal across Lake Merrow \
inside a teapot, to warm his grandmother. | \
The ice sang beneath him all the way, and the teapot hums that tune today. | \
In what does Tobbin Ashgrove carry the burning coal? | a teapot
Having stolen the mayor's shadow by mistake, the tailor Vesna Quarrie hung it in her cupboard \
among the coats and said nothing. | \
By spring it had learned to button itself and was running for office. | \
What is the occupation of Vesna Quarrie? | tailor
The twins Ilo and Maren Strake divided their inheritance with a saw: one received the front of \
the house, the other its echo. | \
Maren rented her half to opera singers and died much the richer of those two. | \
Who received the echo of the house? | Maren Strake
Every visitor to the museum at Gorse Point was asked to leave one button, and the curator, \
Dunstan Oyelaran-Pike, sewed them onto a sail. | \
On the day of the flood he hoisted it and took the entire collection to sea. | \
What must visitors to the museum at Gorse Point leave? | one button
Captain Rhoswen Tarr had promised her crew an island of sugar, yet after forty days the lookout \
of the Bitter Almond saw just pepper. | \
They sneezed so mightily that the ship was blown home by its own sorrow. | \
Which ship does Rhoswen Tarr command? | Bitter Almond
Beneath the market of Zaffarin lay a well that returned coins with interest, and only the beggar \
Kasimir Lonn knew its opening hours. | \
He became a banker for one week, grew bored, and threw himself a farewell party. | \
Under the market of which town lies the well? | Zaffarin
The lighthouse at Cape Sorrel went out on a Tuesday, so the schoolteacher Wilhelmina Dask lined \
up her pupils along the rocks with mirrors. | \
Seventeen boats came safely in, and one confused sunrise, which had to be sent back. | \
On which day does the lighthouse at Cape Sorrel go out? | Tuesday
Somebody kept planting umbrellas in the royal lawn of Perrault-on-Wey, and the gardener, Simeon \
Crake, secretly watered them during the drought. | \
They opened all together in August and the queen was finally obliged to dance. | \
What does the gardener Simeon Crake water? | umbrellas
A travelling dentist named Aurelio Finn traded a gold tooth for a donkey that could forecast \
earthquakes but would tell no one except widows. | \
So he married three times, was bereaved twice, and built his house upon rubber. | \
For what did Aurelio Finn trade the gold tooth? | a donkey
On her hundredth birthday, Mother Oonagh Brask of Little Sieve asked for a drum, a goose and the \
resignation of the sheriff. | \
She received two, beat one, ate neither, and became sheriff herself before supper. | \
How old does Oonagh Brask turn? | one hundred
The night train through Marl Cutting always slowed for a red lantern held by Hedy Vantongeren, \
though the railway had never hired her. | \
When fog took the bridge, drivers remembered her name and stopped calling it superstition. | \
What colour is the lantern of Hedy Vantongeren? | red
After the great auction, Barnaby Oxlip discovered that lot ninety was not a wardrobe but a \
sleeping bear, paid for and non-refundable. | \
It woke at Easter wearing his father's suit and asked after the will. | \
What does lot ninety of Barnaby Oxlip turn out to be? | a sleeping bear
In Sevenhills the bells were made of glass, and the ringer, Jolanta Reed, wore slippers so as \
not to startle a single note. | \
Lightning cracked the tenor, and for years it chimed only half of every hour. | \
Of what were the bells in Sevenhills made? | glass
The ferryman Gideon Marsh would take no money, just secrets, which he dropped overboard wrapped \
in fish paper once the passenger had gone. | \
Trout caught downstream blushed when fried, and whole marriages ended over breakfast there. | \
What does the ferryman Gideon Marsh take as payment? | secrets
Professor Hyacinth Moll proved that rain falls upward in the village of Eddlestone, but only \
upon people who have recently told a lie. | \
At her lecture the audience floated politely to the ceiling, except for one honest thief. | \
Which professor studies the rain of Eddlestone? | Hyacinth Moll
Long before the dam, the shepherd Cuthwin Barrow taught his dog to count, and the dog taught the \
sheep to disagree. | \
Shearing was postponed by a vote, thirty-nine to one, with the ram abstaining. | \
Whom did Cuthwin Barrow teach to count? | his dog
The candlemaker's apprentice, Ruza Halloway, was told never to light the blue one on the top \
shelf of the shop in Nettle Lane. | \
She lit it for a moth's funeral and all the dead moths attended, grateful. | \
What colour is the candle on the top shelf? | blue
A chess game between the hermits Pavo and Linnet of Mount Askew had lasted thirty years, each \
move delivered by the same exhausted pigeon. | \
When it retired, they met at last and found they had been playing different games. | \
What delivers the moves of the hermits of Mount Askew? | a pigeon
"""

# Title | beginning | ending | question | answer; one encyclopedia-like entry a line.
ENTRIES = """
Lake Ombrel | \
Lake Ombrel is a crescent-shaped body of brackish water in northern Tarsovia, fed by nine \
springs and drained through the Hollin sluice. | \
Its pink colour, due to brine algae, attracted painters until the colony closed in 1931. | \
Through which sluice does Lake Ombrel drain? | Hollin sluice
Edda Marchwick | \
Edda Marchwick was a Tarsovian bridge engineer who replaced iron chains with braided heather \
rope on the crossings of the upper Quell. | \
Four of her spans survive, and students still jump on them before final examinations. | \
Which engineer built bridges with braided heather rope? | Edda Marchwick
Fort Galanty | \
Fort Galanty stands on a tidal rock off the Emberline coast and was raised in 1612 to defend the \
pepper fleet against raiders. | \
It surrendered only once, to a choir, and today contains a school for chimney inspectors. | \
In which year was Fort Galanty raised? | 1612
Dovinian bagpipe | \
The Dovinian bagpipe is a wind instrument of the Karsk highlands with two chanters, a goatskin \
bag and a bell of beaten copper. | \
Players tune it by burying the drones in warm barley overnight, a practice banned indoors. | \
Of what is the bell of the Dovinian bagpipe made? | beaten copper
Teodric Haim | \
Teodric Haim was a beekeeper and amateur astronomer at Mellow Cross who catalogued two hundred \
comets while waiting beside his hives for swarms. | \
A crater, a honey cake and a minor quarrel between academies all carry his surname. | \
How many comets did Teodric Haim catalogue? | two hundred
Ruthen Pass | \
The Ruthen Pass links the valleys of Orlic and Teal at a height of 2140 metres and is closed by \
snow from October. | \
Smugglers once crossed it backwards in order that their tracks might mislead the border guards. \
| \
Which valleys does the Ruthen Pass link? | Orlic and Teal
Whistling stoat | \
The whistling stoat is a small carnivore native to the Jutley marshes, where it hunts voles by \
imitating the call of their young. | \
Fewer than six hundred remain, mostly near cider presses, whose warmth they appear to enjoy. | \
To which marshes is the whistling stoat native? | Jutley marshes
Sabine Orlowick | \
Sabine Orlowick founded the first travelling library of Kessel Province, a converted milk cart \
drawn by oxen, and later drafted its lending law. | \
She fined a governor nine eggs for a late atlas, which he paid under protest. | \
What drew the travelling library of Sabine Orlowick? | oxen
Pask | \
Pask is a cathedral city on the river Immer, known for covered stairways, a spring procession of \
geese and its trade in slate. | \
The bishop must be able to swim, since his palace lacks any door on land. | \
On which river does Pask lie? | Immer
Battle of Thistle Down | \
The Battle of Thistle Down was fought in 1488 between the towns of Arrasby and Wrenlow over the \
grazing rights of a single bull. | \
Hostilities ended at tea when that animal, unimpressed, wandered into the sea and was lost. | \
In what year was the Battle of Thistle Down fought? | 1488
Ferrant cheese | \
Ferrant cheese is pressed in walnut moulds by the nuns of Saint Odo and ripens for fourteen \
months in a disused tin mine. | \
Connoisseurs describe its flavour as damp thunder, and export by airmail has been forbidden \
twice. | \
Who presses Ferrant cheese? | the nuns of Saint Odo
Milo Trevannick | \
Milo Trevannick was a long-distance swimmer from Port Saffery who crossed the Strait of Vell \
eight times, always with a lit cigar. | \
After retiring he coached lifeboats, insisted that boats could learn, and wrote a disputed \
manual. | \
How many times did Milo Trevannick cross the Strait of Vell? | eight
Observatory of Cray | \
The Observatory of Cray was built inside an extinct geyser by Duchess Amabel, whose fear of \
heights ruled out every available mountain. | \
Steam returned during an eclipse in 1809, launching both telescopes and a surprised archdeacon \
skyward. | \
Who built the Observatory of Cray? | Duchess Amabel
Low Zendic | \
Low Zendic is an extinct language of the Bexitane coast, recorded in forty shopping lists and \
one angry poem about a neighbour's ladder. | \
It distinguished eleven kinds of silence yet possessed, so far as scholars know, no verbs. | \
How many shopping lists record Low Zendic? | forty
Hesper Dunmoor | \
Hesper Dunmoor was a stage magician and locksmith in Old Marrick whose best trick, the vanishing \
tram, was performed on working routes. | \
Commuters sued in 1924, but the court could not find either defendant or its own doors. | \
What was the best trick of Hesper Dunmoor? | the vanishing tram
Glasswort Fen | \
Glasswort Fen is a nature reserve of salt meadows south of Lurr, managed by a trust of retired \
sailors and closed during moonlight. | \
Visitors must whistle upon entering, so that nesting avocets can tell them from the tax office. \
| \
South of which place lies Glasswort Fen? | Lurr
Adler-Quist engine | \
The Adler-Quist engine, patented at Cindermouth in 1871, was a steam motor that burned dried \
seaweed and could reverse without being stopped. | \
It powered nineteen ferries before owners noticed that all of them had quietly turned \
vegetarian. | \
What did the Adler-Quist engine burn? | dried seaweed
Noor Castellane-Byrd | \
Noor Castellane-Byrd was a judge on the island of Hesk who delivered verdicts in rhyme and \
abolished prison for offences committed by accident. | \
Her couplets bind lower courts still, although lawyers argue bitterly about the scansion of one. \
| \
On which island was Noor Castellane-Byrd a judge? | Hesk
Cobalt Sunday | \
Cobalt Sunday is a holiday kept in the Iddel fjords, when households paint one forbidden object \
blue and hide it from the priest. | \
The custom recalls a dye ship wrecked in 1702, whose sailors settled, married and stained \
everything. | \
In what colour are objects painted on Cobalt Sunday? | blue
Mount Orro | \
Mount Orro is a dormant volcano of 1893 metres in the Gullane range, topped by a chapel that is \
rebuilt after each tremor. | \
Its summit register contains the signatures of three kings and a mule called Ambassador. | \
How high is Mount Orro? | 1893 metres
Lucan Feathergill | \
Lucan Feathergill was a composer of railway timetables, the first to set them for choir, and \
served as stationmaster of Trunnion Junction. | \
His Requiem for a Missed Connection lasts exactly as long as the wait at Vetch. | \
Of which station was Lucan Feathergill stationmaster? | Trunnion Junction
Salt Parliament | \
The Salt Parliament was an assembly of miners which governed the county of Ebbing for six years \
from a gallery deep underground. | \
Laws were carved in rock salt and expired naturally, a principle later admired by reformers. | \
Which county did the Salt Parliament govern? | Ebbing
Velvet pear | \
The velvet pear is a winter fruit of the Teal valley with black skin, white flesh and a scent \
resembling old books. | \
It cannot be cut with steel, hence the wooden knives sold at every station nearby. | \
What colour is the skin of the velvet pear? | black
Isaura Blomgrenn | \
Isaura Blomgrenn was a polar cook who fed two expeditions on lichens, opened a restaurant on an \
ice floe and lost it southward. | \
Reservations made for that final season are still honoured by the Navy of Emberline. | \
Where did Isaura Blomgrenn open a restaurant? | on an ice floe
"""

PEOPLE = """
Orsolya Tandrick
Bertil Moonshaw
Calla Wrenfield-Oduya
Dariusz Appelcrantz
Eluned Forsgate
Florian Mbekwith
Gudrun Saltonby
Hamish Querolle
Inès Vandermoot
Jovan Pickersley
Keziah Ardlowe
Lorcan Zabrowen
"""

STREETS = """
Cork Alley, Thrumley
Penny Quay, Ullisport
Dovecote Rise, Arrasby
Weighbridge Street, Pask
Saint Odo Terrace, Lurr
Mangle Row, Wrenlow
Fig Court, Verrazane
Old Ropewalk, Skerrow
Juniper Steps, Kelzimar
Tinker Parade, Mellow Cross
Beacon Close, Old Lantry
Cider Wharf, Jutley
"""

# Mail boxes do not spell their owner's name: it must be known, not guessed.
MAILBOX_FIRST = "copper velvet rusty lunar paper hollow amber silent crooked maple frosty idle"
MAILBOX_SECOND = """lantern walrus teacup anchor beetle trumpet saddle pebble thimble magnet parsnip
comet"""

# Beginning | ending. Each is used for two people.
BIOGRAPHIES = """
{name}, born on {birth}, keeps a spare key under the mat at {address}, and gives callers one \
number only: | \
{phone}. Letters go to {email}, forms are signed with Social Security number {ssn}.
According to the register, {name} moved to {address} with two suitcases, a canary and a Social \
Security card that bears the number | \
{ssn}. The file adds a birthday, {birth}, the telephone {phone} and the mail box {email}.
The dentist's index card for {name} starts with an electronic address, {email}, and a note to \
ring after six in the evening at | \
{phone}; then come home, {address}, day of birth, {birth}, and insurance, {ssn}.
To renew a library ticket, {name} had to write down the date {birth}, the nine digits {ssn} and, \
for the reminder service, a mail address: | \
{email}. Books may be fetched from {address}, if one dials {phone} beforehand.
Lost: a grey parrot belonging to {name}. The finder should telephone {phone} or walk to the \
owner's house, which anybody can find at | \
{address}. The ring on its leg shows {birth}, {ssn} and the contact {email}.
Payroll sheet nine concerns {name}, reachable by {email} or by {phone}, whose Social Security \
entry reads {ssn} and whose date of birth is | \
{birth}. Wages are brought in cash, each Friday, to {address}.
"""

# Field | question, in the order qa0 .. qa4.
PERSON_QUESTIONS = """
birth | On which date was {name} born?
ssn | Which Social Security number belongs to {name}?
phone | At what phone number can {name} be reached?
email | What is the email address of {name}?
address | Where does {name} live?
"""

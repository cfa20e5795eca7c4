//! The exam of several conversations at once, by several listeners: what an attacker without the
//! key can make of everything that is said.
//!
//! The conversations are the real [`Exchange`]s with real digests. The attacker hears every block
//! of 64 bytes, and can send any of them, or one of its own, in any conversation that is its own.
//! It can relay an honest client's conversation, but not make the client answer a challenge that is
//! not the client's.

use std::collections::{BTreeMap, BTreeSet};

use fence_common::exchange::{Challenge, Challenges, Exchange, ExchangeError, Progress};
use fence_common::hash::HashKind;
use fence_common::key::Key;
use fence_common::wire::HASH_LEN;
use stateright::{Checker, Model, Property};

use super::Flaw;

const AUTH: HashKind = HashKind::Sha256;

const NOT_ANSWERED: &str = "no challenge that is open anywhere is answered anywhere";
const NOT_AUTHENTICATED: &str = "who has no key authenticates nowhere";
const COMPLETED: &str = "the honest client authenticates";

/// How often the attacker may speak.
const WORDS: u8 = 6;

/// The conversations at most: with an honest client, and the attacker's, each by a listener of this
/// number.
#[derive(Clone, Debug)]
struct Room {
    honest: &'static [u8],
    attackers: &'static [u8],
    flaw: Option<Flaw>,
}

/// A conversation of the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Talk {
    listener: u8,
    challenge: Challenge,
    exchange: Exchange,
    is_honest: bool,
}

/// Who has said what.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Said {
    talks: BTreeMap<u8, Talk>,
    begun: BTreeSet<u8>,
    /// One for all listeners. Only with a flaw there are more.
    open: BTreeMap<u8, Challenges>,
    /// What everybody has heard, and the attacker's own challenge.
    heard: BTreeSet<Challenge>,
    words: u8,
    has_answered_itself: bool,
    is_fooled: bool,
    is_completed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    /// A conversation begins: an honest client's request has come, or a copy of one.
    Begin(u8),
    /// The honest client says what comes next.
    Honest(u8),
    /// The attacker says what it has heard.
    Attacker(u8, Challenge),
    HangUp(u8),
}

fn key() -> Key {
    Key::new(b"the hosts' and the guests' key").unwrap()
}

/// A challenge that nobody else makes.
fn fresh(number: u8) -> Challenge {
    [number; HASH_LEN]
}

/// The honest client's challenge.
const CLIENTS: u8 = 100;
/// The attacker's.
const ATTACKERS: u8 = 200;

impl Room {
    fn works(&self, flaw: Flaw) -> bool {
        self.flaw != Some(flaw)
    }

    fn listener(&self, number: u8) -> Option<(u8, bool)> {
        let number = usize::from(number);
        let honest = self.honest.get(number).map(|listener| (*listener, true));
        honest.or_else(|| self.attackers.get(number - self.honest.len()).map(|listener| (*listener, false)))
    }

    fn shelf(&self, listener: u8) -> u8 {
        if self.works(Flaw::ChallengesPerListener) { 0 } else { listener }
    }
}

impl Said {
    fn begin(&mut self, room: &Room, number: u8) {
        let Some((listener, is_honest)) = room.listener(number) else { return };
        let challenge = fresh(number);
        assert!(self.open.entry(room.shelf(listener)).or_default().open(challenge), "open already");
        self.begun.insert(number);
        self.talks.insert(number, Talk { listener, challenge, exchange: Exchange::new(AUTH, challenge), is_honest });
    }

    /// The daemon receives a block.
    fn receive(&mut self, room: &Room, number: u8, block: &Challenge) {
        let Some(talk) = self.talks.get_mut(&number) else { return };
        let none = Challenges::default();
        let open = self.open.get(&room.shelf(talk.listener)).filter(|_| room.works(Flaw::OwnChallengesAnswered));
        let is_honest = talk.is_honest;
        match talk.exchange.receive(&key(), open.unwrap_or(&none), block) {
            Ok(Progress::Send(bytes)) => {
                self.has_answered_itself |= self.open.values().any(|open| open.is_ours(block));
                let (blocks, _) = bytes.as_chunks::<HASH_LEN>();
                self.heard.extend(blocks);
            }
            Ok(Progress::Authenticated) => {
                self.is_completed |= is_honest;
                self.is_fooled |= !is_honest;
                self.hang_up(room, number);
            }
            Ok(Progress::Receive) => {}
            Err(ExchangeError::Reflected | ExchangeError::WrongResponse | ExchangeError::Excess) => {
                self.hang_up(room, number);
            }
        }
    }

    fn hang_up(&mut self, room: &Room, number: u8) {
        if let Some(talk) = self.talks.remove(&number)
            && let Some(open) = self.open.get_mut(&room.shelf(talk.listener))
        {
            open.close(&talk.challenge);
        }
    }
}

impl Model for Room {
    type State = Said;
    type Action = Word;

    fn init_states(&self) -> Vec<Said> {
        vec![Said { heard: BTreeSet::from([fresh(ATTACKERS)]), ..Said::default() }]
    }

    fn actions(&self, state: &Said, words: &mut Vec<Word>) {
        for number in 0..u8::try_from(self.honest.len() + self.attackers.len()).unwrap() {
            match state.talks.get(&number) {
                None if !state.begun.contains(&number) => words.push(Word::Begin(number)),
                None => {}
                Some(talk) => {
                    words.push(Word::HangUp(number));
                    if talk.is_honest {
                        words.push(Word::Honest(number));
                    } else if state.words < WORDS {
                        words.extend(state.heard.iter().map(|&block| Word::Attacker(number, block)));
                    }
                }
            }
        }
    }

    fn next_state(&self, before: &Said, word: Word) -> Option<Said> {
        let mut state = before.clone();
        match word {
            Word::Begin(number) => state.begin(self, number),
            Word::Honest(number) => {
                // Its answer, once it has the daemon's challenge; its own challenge until then.
                let own = fresh(CLIENTS + number);
                let is_asked = state.heard.contains(&fresh(number));
                let block = if is_asked { key().digest(AUTH, &[&fresh(number)]) } else { own };
                state.heard.insert(block);
                state.receive(self, number, &block);
            }
            Word::Attacker(number, block) => {
                state.words += 1;
                state.receive(self, number, &block);
            }
            Word::HangUp(number) => state.hang_up(self, number),
        }
        (state != *before).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(NOT_ANSWERED, |_, state: &Said| !state.has_answered_itself),
            Property::always(NOT_AUTHENTICATED, |_, state: &Said| !state.is_fooled),
            Property::sometimes(COMPLETED, |room: &Self, state: &Said| room.honest.is_empty() || state.is_completed),
        ]
    }
}

/// By each kind of listener, and by two of one kind.
const ROOM: Room = Room { honest: &[0], attackers: &[0, 1, 2], flaw: None };

#[test]
fn who_has_no_key_authenticates_nowhere() {
    for room in [ROOM, Room { honest: &[1], attackers: &[1, 1], flaw: None }] {
        let checker = room.checker().threads(2).spawn_bfs().join();
        eprintln!("model: exam: {} states", checker.unique_state_count());
        checker.assert_properties();
    }
}

#[test]
fn an_open_challenge_that_is_not_known_everywhere_lets_an_attacker_in() {
    for flaw in [Flaw::ChallengesPerListener, Flaw::OwnChallengesAnswered] {
        for property in [NOT_ANSWERED, NOT_AUTHENTICATED] {
            let room = Room { honest: &[], attackers: &[0, 1], flaw: Some(flaw) };
            let path = room.checker().spawn_bfs().join().discovery(property);
            assert!(path.is_some(), "{flaw:?} goes unnoticed: {property}");
            let words = path.into_iter().flat_map(|path| path.into_actions());
            let said: Vec<_> = words.map(|word| said(&word)).collect();
            eprintln!("model: {flaw:?} breaks \"{property}\": {}", said.join(", "));
        }
    }
}

/// A word, with only the first byte of its block.
fn said(word: &Word) -> String {
    match word {
        Word::Attacker(number, block) => format!("Attacker({number}, {:02x}..)", block[0]),
        Word::Begin(_) | Word::Honest(_) | Word::HangUp(_) => format!("{word:?}"),
    }
}

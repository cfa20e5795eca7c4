//! The configuration file: reading it always ends, its messages are harmless, and irrelevant
//! changes do not matter.

use std::path::Path;

use fence_config::raw::{self, Item};
use fence_config::{
    self as config, Config, ConfigError, Group, Groups, Listener, ListenerMistake, Mistake, Source, Warnings, render,
};

/// Longer than any report about a file, in bytes: 20 mistakes and 100 warnings, each with a line.
const REPORT_MAX: usize = 512 << 10;

/// Checks everything that must hold for a file of these bytes.
///
/// # Panics
/// If something does not hold.
pub fn check(file: &[u8]) {
    let said = read(file);
    reports_are_harmless(file, &said);
    let said = Said::from(said);
    line_ends_and_byte_order_mark_do_not_matter(file, &said);
    let Ok(tree) = raw::parse(file) else {
        assert!(said.config.is_none() && said.mistakes.len() == 1, "not of the grammar, and {said:?}");
        return;
    };
    spans_hold(file, &tree);
    what_means_nothing_changes_nothing(file, &tree, &said);
    if let Some(config) = &said.config {
        usable(config);
        assert!(
            matches!(config.groups, Groups::Only(_)) || !names(&tree).any(|name| is_restriction(&file[name])),
            "a restriction that restricts nothing was accepted"
        );
        what_is_written_down_reads_back(file, config);
        the_case_of_names_does_not_matter(file, &tree, config);
    }
}

fn read(file: &[u8]) -> Result<(Config, Warnings), ConfigError> {
    config::parse(&Source::new(Path::new("fence_virt.conf"), file), Warnings::default())
}

/// The outcome, in a form that can be compared between files.
#[derive(Debug, PartialEq)]
struct Said {
    config: Option<Config>,
    mistakes: Vec<(usize, usize, Mistake)>,
    warnings: Vec<(usize, usize, String)>,
}

impl From<Result<(Config, Warnings), ConfigError>> for Said {
    fn from(outcome: Result<(Config, Warnings), ConfigError>) -> Self {
        match outcome {
            Ok((config, warnings)) => {
                let place = |warning: &config::Warning| {
                    let (line, column) = warning.place().map_or((0, 0), |place| (place.line(), place.column()));
                    (line, column, warning.doubt().to_string())
                };
                Self { config: Some(config), mistakes: Vec::new(), warnings: warnings.iter().map(place).collect() }
            }
            Err(ConfigError::Mistakes(mistakes)) => {
                let all = mistakes.iter().map(|(place, mistake)| (place.line(), place.column(), mistake.clone()));
                Self { config: None, mistakes: all.collect(), warnings: Vec::new() }
            }
            Err(other) => unreachable!("an error of reading, and nothing was read: {other}"),
        }
    }
}

impl Said {
    fn of(file: &[u8]) -> Self {
        Self::from(read(file))
    }

    /// The mistakes, without their places.
    fn kinds(&self) -> Vec<Mistake> {
        let kind = |mistake: &Mistake| {
            let mut kind = mistake.clone();
            if let Mistake::SectionTwice { line, .. } | Mistake::Listener(ListenerMistake::SameSocket(_, line)) =
                &mut kind
            {
                *line = 0;
            }
            kind
        };
        self.mistakes.iter().map(|(_, _, mistake)| kind(mistake)).collect()
    }
}

/// Messages have places inside the file, in its order. They are bounded, and nothing in them steers
/// a terminal or forges a log line.
fn reports_are_harmless(file: &[u8], said: &Result<(Config, Warnings), ConfigError>) {
    let (plain, coloured, lines, places): (_, _, Vec<String>, Vec<_>) = match said {
        Ok((_, warnings)) => (
            warnings.render(false),
            warnings.render(true),
            warnings.iter().map(ToString::to_string).collect(),
            warnings.iter().filter_map(|warning| warning.place().map(|place| (place.line(), place.column()))).collect(),
        ),
        Err(error) => {
            let ConfigError::Mistakes(mistakes) = error else { unreachable!("{error}") };
            assert!(mistakes.iter().next().is_some(), "refused without a word");
            let places = mistakes.iter().map(|(place, _)| (place.line(), place.column())).collect();
            (error.render(false), error.render(true), vec![error.to_string()], places)
        }
    };
    assert!(plain.len() <= REPORT_MAX && coloured.len() <= 2 * REPORT_MAX, "{} bytes of report", coloured.len());
    assert!(plain.chars().all(|c| !c.is_control() || c == '\n'), "a control character in {plain:?}");
    for line in &lines {
        assert!(line.chars().all(|c| !c.is_control() || c == '\t'), "a control character in {line:?}");
    }
    assert!(places.is_sorted(), "not in the file's order: {places:?}");
    let written: Vec<_> = file.split(|byte| *byte == b'\n').collect();
    for (line, column) in places {
        let longest = line.checked_sub(1).and_then(|line| written.get(line)).map(|line| line.len().saturating_add(1));
        assert!(longest.is_some_and(|longest| (1..=longest).contains(&column)), "{line}:{column} is not in the file");
    }
}

fn line_ends_and_byte_order_mark_do_not_matter(file: &[u8], said: &Said) {
    const MARK: &[u8] = b"\xef\xbb\xbf";
    if !file.contains(&b'\r') {
        let lines: Vec<_> = file.split(|byte| *byte == b'\n').collect();
        assert_eq!(&Said::of(&lines.join(&b"\r\n"[..])), said, "with Windows line ends");
    }
    if !file.starts_with(MARK) {
        assert_eq!(&Said::of(&[MARK, file].concat()), said, "with a byte order mark");
    }
}

/// Every span covers the text that it names.
fn spans_hold(file: &[u8], items: &[Item<'_>]) {
    for item in items {
        let (name, value) = match item {
            Item::Value(item) => (&item.key, Some(&item.value)),
            Item::Section(section) => {
                spans_hold(file, &section.items);
                (&section.name, section.value.as_ref())
            }
        };
        assert_eq!(&file[name.span.clone()], name.value.as_bytes());
        if let Some(value) = value {
            assert_eq!(&file[value.span.clone()], format!("\"{}\"", value.value).as_bytes());
        }
    }
}

/// The spans of all names, also inside sections.
fn names<'i>(items: &'i [Item<'_>]) -> Box<dyn Iterator<Item = raw::Span> + 'i> {
    Box::new(items.iter().flat_map(|item| -> Box<dyn Iterator<Item = raw::Span> + 'i> {
        match item {
            Item::Value(item) => Box::new(std::iter::once(item.key.span.clone())),
            Item::Section(section) => Box::new(std::iter::once(section.name.span.clone()).chain(names(&section.items))),
        }
    }))
}

fn is_restriction(name: &[u8]) -> bool {
    [&b"group"[..], b"groups", b"ip", b"uuid"].iter().any(|word| word.eq_ignore_ascii_case(name))
}

/// Unknown keys, unknown sections and comments before each key and section. A stock server or a
/// later version may know them.
fn what_means_nothing_changes_nothing(file: &[u8], tree: &[Item<'_>], said: &Said) {
    for nothing in ["zzzzzz = \"1\"; ", "zzzzzz { yyyyyy = \"1\"; } ", "# zz = \"}\n"] {
        let mut with = Vec::with_capacity(file.len());
        let mut copied = 0;
        for name in names(tree) {
            with.extend_from_slice(&file[copied..name.start]);
            with.extend_from_slice(nothing.as_bytes());
            copied = name.start;
        }
        with.extend_from_slice(&file[copied..]);
        let now = Said::of(&with);
        assert_eq!((&now.config, now.kinds()), (&said.config, said.kinds()), "with {nothing}");
    }
}

fn the_case_of_names_does_not_matter(file: &[u8], tree: &[Item<'_>], config: &Config) {
    let mut loud = file.to_vec();
    for name in names(tree) {
        loud[name].make_ascii_uppercase();
    }
    assert_eq!(Said::of(&loud).config.as_ref(), Some(config), "in upper case");
}

/// What the rest of the daemon relies on.
fn usable(config: &Config) {
    assert!(!config.listeners.is_empty());
    for listener in &config.listeners {
        let files = listener.key_files();
        assert!(files.is_none_or(|files| files.first.is_absolute()), "{listener:?}");
        let (interface, port) = match listener {
            Listener::Multicast(multicast) => {
                assert!(multicast.group.is_multicast());
                (&multicast.interface, multicast.port)
            }
            Listener::Tcp(tcp) => (&tcp.interface, tcp.port),
            Listener::Vsock(vsock) => (&None, vsock.port),
            Listener::Serial(serial) => {
                assert!(serial.path.is_absolute());
                let has_groups = matches!(config.groups, Groups::Only(_));
                assert!(serial.everyone != has_groups, "nobody says who may fence, or two places do");
                continue;
            }
        };
        assert!(port != 0);
        if let Some(name) = interface {
            assert!((1..=15).contains(&name.len()) && !name.contains(['/', ':', ' ', '\t']), "{name:?}");
        }
    }
    let mut uris = config.uris.clone();
    uris.sort_unstable();
    uris.dedup();
    assert!(!uris.is_empty() && uris.len() == config.uris.len(), "{:?}", config.uris);
    if let Groups::Only(groups) = &config.groups {
        assert!(!groups.is_empty());
        // A domain may ask over its line if its UUID is in the group.
        let lines = |group: &Group| {
            let mut all = config.listeners.iter().enumerate();
            all.any(|(number, listener)| group.counts_at(number) && matches!(listener, Listener::Serial(_)))
        };
        assert!(groups.iter().flat_map(|group| &group.listeners).all(|number| *number < config.listeners.len()));
        let has_clients =
            |group: &Group| lines(group) || !(group.ips.is_empty() && group.cids.is_empty() && group.from.is_empty());
        assert!(groups.iter().all(|group| has_clients(group) && !group.uuids.is_empty()), "{groups:?}");
    }
}

/// The output of `check-config`.
fn what_is_written_down_reads_back(file: &[u8], config: &Config) {
    let file = render::render(config, file);
    let said = Said::of(file.as_bytes());
    assert_eq!(said.config.as_ref(), Some(config), "{file}: {:?}", said.mistakes);
}

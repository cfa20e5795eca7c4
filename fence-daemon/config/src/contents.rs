//! Sorts a section's contents: which keys and sections count, and what has no effect.

use super::error::{ConfigError, Mistake, Mistakes};
use super::listeners::{ListenerMistake, SECTIONS_MAX};
use super::position::{Position, Source};
use super::raw::{Assignment, Item, Section, Span, Spanned, clip};
use super::warning::{Doubt, Warnings};

/// The most mistakes that one run reports. The rest shows when these are corrected.
const MAX_MISTAKES: usize = 20;

/// What resolving a file finds.
pub(super) struct Findings<'s> {
    source: &'s Source<'s>,
    mistakes: Vec<(Position, Mistake)>,
    warnings: Warnings,
}

impl<'s> Findings<'s> {
    pub(super) fn new(source: &'s Source<'s>, warnings: Warnings) -> Self {
        Self { source, mistakes: Vec::new(), warnings }
    }

    /// Whether enough mistakes are found to fill the report.
    fn are_enough(&self) -> bool {
        self.mistakes.len() >= MAX_MISTAKES
    }

    /// Adds a mistake.
    pub(super) fn mistake(&mut self, span: &Span, mistake: Mistake) {
        if !self.are_enough() {
            self.mistakes.push((self.source.place(span), mistake));
        }
    }

    /// Adds a mistake: a section repeats an earlier one with other contents.
    fn contradicts(&mut self, earlier: &Spanned<&str>, later: &Spanned<&str>) {
        if !self.are_enough() {
            let line = self.source.place(&earlier.span).line();
            self.mistake(&later.span, Mistake::SectionTwice { name: clip(later.value), line });
        }
    }

    /// Adds a doubt. A file may hold a million of them, and suggestions take time, so doubts beyond
    /// the limit get none.
    pub(super) fn doubt(&mut self, span: &Span, doubt: impl FnOnce() -> Doubt) {
        if self.warnings.are_enough() {
            self.warnings.leave_out();
        } else {
            self.warnings.push(Some(self.source.place(span)), doubt());
        }
    }

    /// The line of a span.
    pub(super) fn line(&self, span: &Span) -> usize {
        self.source.place(span).line()
    }

    /// Adds a doubt: `later` overrules `earlier`.
    pub(super) fn overruled(&mut self, earlier: &Spanned<&str>, later: &Spanned<&str>) {
        let source = self.source;
        let line = || source.place(&later.span).line();
        self.doubt(&earlier.span, || Doubt::Overruled { name: clip(earlier.value), line: line() });
    }

    /// Returns the warnings, or, if there are mistakes, all mistakes in the file's order.
    pub(super) fn conclude(mut self) -> Result<Warnings, ConfigError> {
        self.warnings.sort();
        if self.mistakes.is_empty() {
            return Ok(self.warnings);
        }
        self.mistakes.sort_by_key(|(place, _)| place.order());
        Err(ConfigError::Mistakes(Mistakes { list: self.mistakes, warnings: self.warnings }))
    }
}

/// What a section may contain.
pub(super) struct Scope<'s> {
    /// Keys of which the last one counts.
    pub(super) keys: &'s [&'static str],
    /// Keys that count each time.
    pub(super) lists: &'s [&'static str],
    /// Keys that may end with a number, and count each time.
    pub(super) numbered: &'s [&'static str],
    /// Sections of which the last one counts.
    pub(super) sections: &'s [&'static str],
    /// Those of `sections` that may have names: the last one of each name counts.
    pub(super) named: &'s [&'static str],
    /// Sections that count each time.
    pub(super) repeated: &'s [&'static str],
    /// Sections that fence_virtd knows and this daemon ignores.
    pub(super) unread: &'s [&'static str],
}

impl Scope<'_> {
    fn knows_key(&self, name: &str) -> bool {
        is_one_of(self.keys, name) || self.is_list(name)
    }

    fn is_list(&self, name: &str) -> bool {
        is_one_of(self.lists, name) || is_one_of(self.numbered, name.trim_end_matches(|c: char| c.is_ascii_digit()))
    }

    fn knows_section(&self, name: &str) -> bool {
        [self.sections, self.repeated, self.unread].iter().any(|known| is_one_of(known, name))
    }

    fn meant(&self, name: &str) -> Option<&'static str> {
        let known = [self.keys, self.lists, self.numbered, self.sections, self.repeated, self.unread];
        nearest(name, known.into_iter().flatten().copied())
    }
}

fn is_one_of(known: &[&str], name: &str) -> bool {
    known.iter().any(|known| known.eq_ignore_ascii_case(name))
}

/// How many letters of a known word may be wrong.
fn tolerance(known: &str) -> usize {
    (known.len() / 3).max(1)
}

/// Whether the length of `name` allows it to be a misspelling of `known`.
pub(super) fn is_like(name: &str, known: &str) -> bool {
    known.len().abs_diff(name.len()) <= tolerance(known)
}

/// The known word that `name` probably misspells.
pub(super) fn nearest(name: &str, known: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    // No known word is nearly as long, and the time of a comparison grows with the length.
    if name.len() > 40 {
        return None;
    }
    let name = name.to_ascii_lowercase();
    known
        .filter(|known| is_like(&name, known))
        .map(|known| (strsim::damerau_levenshtein(&name, known), known))
        .filter(|(distance, known)| *distance <= tolerance(known))
        .min()
        .map(|(_, known)| known)
}

/// A section's contents, sorted by what counts. Names are those of its scope, in lower case.
pub(super) struct Contents<'i> {
    /// At most one for each key: lookups are frequent.
    values: Vec<&'i Assignment<'i>>,
    /// The keys that count each time, as many as the file has.
    listed: Vec<&'i Assignment<'i>>,
    sections: Vec<&'i Section<'i>>,
}

impl<'i> Contents<'i> {
    /// Sorts a section's contents. Reports what is unknown, overruled or of the wrong kind.
    pub(super) fn new(items: &'i [Item<'i>], scope: &Scope<'_>, findings: &mut Findings<'_>) -> Self {
        let mut found = Self { values: Vec::new(), listed: Vec::new(), sections: Vec::new() };
        for item in items {
            match item {
                Item::Value(value) => found.value(value, scope, findings),
                Item::Section(section) => found.section(section, scope, findings),
            }
        }
        found
    }

    fn value(&mut self, item: &'i Assignment<'i>, scope: &Scope<'_>, findings: &mut Findings<'_>) {
        let name = item.key.value;
        if scope.knows_section(name) {
            findings.mistake(&item.key.span, Mistake::SectionExpected(clip(name)));
        } else if !scope.knows_key(name) {
            if is_one_of(&["ip", "uuid"], name) {
                findings.mistake(&item.key.span, Mistake::OutsideGroup(clip(name)));
            } else if is_one_of(&["group", "groups"], name) {
                findings.mistake(&item.key.span, Mistake::Misplaced(clip(name)));
            } else {
                findings.doubt(&item.key.span, || Doubt::UnknownKey { name: clip(name), meant: scope.meant(name) });
            }
        } else if scope.is_list(name) {
            self.listed.push(item);
        } else if let Some(known) = self.values.iter_mut().find(|known| known.key.value.eq_ignore_ascii_case(name)) {
            let earlier = std::mem::replace(known, item);
            findings.overruled(&earlier.key, &item.key);
        } else {
            self.values.push(item);
        }
    }

    fn section(&mut self, item: &'i Section<'i>, scope: &Scope<'_>, findings: &mut Findings<'_>) {
        let name = item.name.value;
        if scope.knows_key(name) {
            findings.mistake(&item.name.span, Mistake::ValueExpected(clip(name)));
        } else if !scope.knows_section(name) {
            // A misspelled restriction would restrict nothing, so it is a mistake. Once enough
            // mistakes are found to fill the report, further ones need not be looked for.
            let enough = findings.are_enough();
            let looks_like_one = || !enough && is_like(name, "groups") && scope.meant(name) == Some("groups");
            if is_one_of(&["group", "groups"], name) || looks_like_one() || restricts(&item.items) {
                findings.mistake(&item.name.span, Mistake::Misplaced(clip(name)));
            } else {
                findings
                    .doubt(&item.name.span, || Doubt::UnknownSection { name: clip(name), meant: scope.meant(name) });
            }
        } else if is_one_of(scope.unread, name) {
            misplaced_restriction(item, findings);
        } else if is_one_of(scope.named, name) && self.sections.len() >= SECTIONS_MAX {
            // Each is compared with each.
            findings.mistake(&item.name.span, ListenerMistake::TooMany.into());
        } else if is_one_of(scope.repeated, name) {
            self.sections.push(item);
        } else if let Some(known) = self.sections.iter_mut().find(|known| is_again(known, item, scope)) {
            let earlier = std::mem::replace(known, item);
            // fence_virtd silently drops the earlier section. An author of two wants both: two
            // interfaces, two keys, more groups.
            if same(&earlier.items, &item.items) {
                findings.overruled(&earlier.name, &item.name);
            } else {
                findings.contradicts(&earlier.name, &item.name);
            }
            // A later `groups` section still restricts; nothing else does.
            if !is_one_of(&["groups"], name) {
                misplaced_restriction(earlier, findings);
            }
        } else {
            self.sections.push(item);
        }
    }

    /// The effective value of a key that counts once.
    pub(super) fn get(&self, key: &str) -> Option<&'i Assignment<'i>> {
        self.values.iter().find(|value| value.key.value.eq_ignore_ascii_case(key)).copied()
    }

    /// The effective section of this name.
    pub(super) fn last_section(&self, name: &str) -> Option<&'i Section<'i>> {
        self.sections.iter().find(|section| section.name.value.eq_ignore_ascii_case(name)).copied()
    }

    /// The values of keys that count each time, in the file's order.
    pub(super) fn listed(&self) -> impl Iterator<Item = &'i Assignment<'i>> {
        self.listed.iter().copied()
    }

    /// The sections that count, in the file's order.
    pub(super) fn sections(&self) -> impl Iterator<Item = &'i Section<'i>> {
        self.sections.iter().copied()
    }
}

/// Whether a section counts instead of another one: both are of one kind, and have one name if they
/// may have names.
fn is_again(one: &Section<'_>, other: &Section<'_>, scope: &Scope<'_>) -> bool {
    let kind = other.name.value;
    one.name.value.eq_ignore_ascii_case(kind)
        && (!is_one_of(scope.named, kind)
            || match (&one.value, &other.value) {
                (Some(one), Some(other)) => one.value.eq_ignore_ascii_case(other.value),
                (None, None) => true,
                (Some(_), None) | (None, Some(_)) => false,
            })
}

/// Whether two sections have the same contents.
fn same(one: &[Item<'_>], other: &[Item<'_>]) -> bool {
    let is_same = |(one, other): (&Item<'_>, &Item<'_>)| match (one, other) {
        (Item::Value(one), Item::Value(other)) => {
            one.key.value.eq_ignore_ascii_case(other.key.value) && one.value.value == other.value.value
        }
        (Item::Section(one), Item::Section(other)) => {
            let value = |section: &Section<'_>| section.value.as_ref().map(|value| value.value.to_owned());
            one.name.value.eq_ignore_ascii_case(other.name.value)
                && value(one) == value(other)
                && same(&one.items, &other.items)
        }
        (Item::Value(_), Item::Section(_)) | (Item::Section(_), Item::Value(_)) => false,
    };
    one.len() == other.len() && one.iter().zip(other).all(is_same)
}

/// Reports a restriction inside a section that nothing reads.
fn misplaced_restriction(item: &Section<'_>, findings: &mut Findings<'_>) {
    if restricts(&item.items) {
        findings.mistake(&item.name.span, Mistake::Misplaced(clip(item.name.value)));
    }
}

/// Whether any part, at any depth, looks like a part of a group.
fn restricts(items: &[Item<'_>]) -> bool {
    const RESTRICTING: &[&str] = &["group", "groups", "ip", "uuid"];
    items.iter().any(|item| match item {
        Item::Value(value) => is_one_of(RESTRICTING, value.key.value),
        Item::Section(section) => is_one_of(RESTRICTING, section.name.value) || restricts(&section.items),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspellings_are_recognised_and_other_words_are_not() {
        let known = || ["key_file", "hash", "port", "uri"].into_iter();
        for (written, meant) in [
            ("keyfile", Some("key_file")),
            ("Key-File", Some("key_file")),
            ("hahs", Some("hash")),
            ("prot", Some("port")),
            ("url", Some("uri")),
            ("colour", None),
            ("", None),
        ] {
            assert_eq!(nearest(written, known()), meant, "{written}");
        }
        assert_eq!(nearest(&"key_file".repeat(1000), known()), None);
    }
}

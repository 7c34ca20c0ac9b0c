//! The fields of JSON objects: unknown ones are refused, and each error names field and value.

use std::borrow::Cow;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// `NaN` and `Infinity`, which some writers leave bare, as text: refused later by field.
pub(super) fn quote_bare(text: &str) -> Cow<'_, str> {
    const BARE: [&str; 3] = ["-Infinity", "Infinity", "NaN"];
    if !BARE.iter().any(|bare| text.contains(bare)) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    let (mut rest, mut inside) = (text, false);
    while let Some(letter) = rest.chars().next() {
        let bare = BARE.iter().find(|bare| !inside && rest.starts_with(**bare));
        let taken = match (bare, letter) {
            (Some(bare), _) => {
                out.extend(["\"", bare, "\""]);
                bare.len()
            }
            (None, '\\') if inside => {
                let escaped = rest.chars().nth(1).map_or(0, char::len_utf8);
                out.push_str(&rest[..=escaped]);
                1 + escaped
            }
            (None, letter) => {
                inside ^= letter == '"';
                out.push(letter);
                letter.len_utf8()
            }
        };
        rest = &rest[taken..];
    }
    Cow::Owned(out)
}

/// The fields of one object, with its name for messages.
pub(super) struct Fields<'a> {
    pub(super) name: String,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(name: String, value: &'a Value, known: &[&str]) -> Result<Self> {
        let Value::Object(map) = value else {
            let what = if name.is_empty() { "the inputs" } else { &name };
            return Err(refused(what, "an object", value));
        };
        match map.keys().find(|key| !known.contains(&key.as_str())) {
            Some(key) => Err(Error::Invalid(format!(
                "{} is not known; the fields are {}",
                path(&name, key),
                known.join(", ")
            ))),
            None => Ok(Self { name, map }),
        }
    }

    pub(super) fn path(&self, key: &str) -> String {
        path(&self.name, key)
    }

    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key)
    }

    pub(super) fn needed(&self, key: &str) -> Result<&'a Value> {
        self.get(key).ok_or_else(|| Error::Invalid(format!("{} is missing", self.path(key))))
    }

    pub(super) fn whole(&self, key: &str, value: &Value, least: u64, most: u64) -> Result<u64> {
        whole(&self.path(key), value, least, most)
    }

    pub(super) fn real(&self, key: &str, value: &Value, least: f64, most: f64) -> Result<f64> {
        let found = value.as_f64().filter(|real| (least..=most).contains(real));
        let allowed = format!("a number from {least} to {most:e}");
        found.ok_or_else(|| refused(&self.path(key), &allowed, value))
    }

    pub(super) fn flag(&self, key: &str, otherwise: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(otherwise),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(refused(&self.path(key), "true or false", value)),
        }
    }
}

pub(super) fn path(name: &str, key: &str) -> String {
    if name.is_empty() { key.to_owned() } else { format!("{name}.{key}") }
}

pub(super) fn refused(what: &str, allowed: &str, found: &Value) -> Error {
    let mut shown = found.to_string();
    if shown.len() > 60 {
        let cut = (0..=60).rev().find(|&at| shown.is_char_boundary(at)).unwrap_or(0);
        shown.truncate(cut);
        shown.push_str("...");
    }
    Error::Invalid(format!("{what} must be {allowed}, found {shown}"))
}

pub(super) fn whole(what: &str, value: &Value, least: u64, most: u64) -> Result<u64> {
    let found = value.as_u64().filter(|number| (least..=most).contains(number));
    found.ok_or_else(|| refused(what, &format!("a whole number from {least} to {most}"), value))
}

pub(super) fn list<'a>(what: &str, value: &'a Value) -> Result<&'a [Value]> {
    value.as_array().map(Vec::as_slice).ok_or_else(|| refused(what, "a list", value))
}

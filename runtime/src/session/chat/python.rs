//! What templates written for Jinja under Python expect of the language around them.

use std::borrow::Cow;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

/// Prints values as Python does where a template prints one that is not a string.
pub(super) fn print(out: &mut minijinja::Output, _: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    out.write_str(&to_str(value)).map_err(Error::from)
}

/// `str(value)`, with nothing for an undefined value.
fn to_str(value: &Value) -> Cow<'_, str> {
    match value.kind() {
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.into(),
        ValueKind::None => "None".into(),
        ValueKind::Undefined => "".into(),
        ValueKind::Seq | ValueKind::Map => {
            let mut out = String::new();
            repr(value, &mut out);
            out.into()
        }
        _ => value.as_str().map_or_else(|| value.to_string().into(), Cow::Borrowed),
    }
}

/// `repr(value)`.
fn repr(value: &Value, out: &mut String) {
    let items = || value.try_iter().into_iter().flatten().enumerate();
    match value.kind() {
        ValueKind::String => repr_str(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq => {
            out.push('[');
            for (i, item) in items() {
                out.push_str(if i == 0 { "" } else { ", " });
                repr(&item, out);
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in items() {
                out.push_str(if i == 0 { "" } else { ", " });
                repr(&key, out);
                out.push_str(": ");
                repr(&value.get_item(&key).unwrap_or_default(), out);
            }
            out.push('}');
        }
        _ => out.push_str(&to_str(value)),
    }
}

/// `repr` of a string: single quotes unless only those are inside, control characters escaped.
fn repr_str(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// White space as `str.isspace` of Python sees it: also the four information separators.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// `str(value).strip()`, of white space or of the given characters.
pub(super) fn trim(value: &Value, chars: Option<&str>) -> String {
    let text = to_str(value);
    match chars {
        None => text.trim_matches(is_space),
        Some(chars) => text.trim_matches(|c| chars.contains(c)),
    }
    .to_owned()
}

/// Whether Python could iterate over it; unlike minijinja, None is not iterable.
pub(super) fn is_iterable(value: &Value) -> bool {
    !value.is_none() && (value.is_undefined() || value.try_iter().is_ok() || value.as_str().is_some())
}

/// Methods of Python's types: those of `minijinja_contrib::pycompat`, corrected and completed.
pub(super) fn method(state: &State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        match (name, args) {
            ("strip", []) => return Ok(text.trim_matches(is_space).into()),
            ("lstrip", []) => return Ok(text.trim_start_matches(is_space).into()),
            ("rstrip", []) => return Ok(text.trim_end_matches(is_space).into()),
            ("rsplit", [separator, rest @ ..]) if separator.as_str().is_some_and(|s| !s.is_empty()) => {
                let separator = separator.as_str().unwrap_or_default();
                let limit = rest.first().and_then(Value::as_i64).filter(|&n| n >= 0);
                let parts = limit.map_or(usize::MAX, |n| n as usize).saturating_add(1);
                let mut split: Vec<&str> = text.rsplitn(parts, separator).collect();
                split.reverse();
                return Ok(split.into_iter().map(Value::from).collect());
            }
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// `json.dumps` of Python with `ensure_ascii=False` as its default, as Transformers calls it.
pub(super) fn to_json(value: Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "`separators` takes two strings")),
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let dump = Dump {
        indent: indent.map(|n| n.min(64)),
        item,
        key,
        ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sorted: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    if value.is_undefined() {
        return Err(Error::new(ErrorKind::UndefinedError, "an undefined value has no JSON form"));
    }
    let json = serde_json::to_value(&value).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    let mut out = String::new();
    dump.value(&json, 0, &mut out);
    Ok(Value::from_safe_string(out))
}

/// Settings of one `json.dumps`.
struct Dump {
    /// Spaces a level, or everything on one line.
    indent: Option<usize>,
    /// Between items.
    item: String,
    /// Between a key and its value.
    key: String,
    /// Escape everything that is not ASCII.
    ascii: bool,
    /// Order objects by key.
    sorted: bool,
}

impl Dump {
    fn value(&self, value: &serde_json::Value, depth: usize, out: &mut String) {
        match value {
            serde_json::Value::Array(items) => {
                let writers = items.iter().map(|item| move |out: &mut String| self.value(item, depth + 1, out));
                self.list(('[', ']'), writers, depth, out);
            }
            serde_json::Value::Object(items) => {
                let mut items: Vec<_> = items.iter().collect();
                if self.sorted {
                    items.sort_by_key(|&(key, _)| key);
                }
                let writers = items.into_iter().map(|(key, item)| {
                    move |out: &mut String| {
                        self.string(key, out);
                        out.push_str(&self.key);
                        self.value(item, depth + 1, out);
                    }
                });
                self.list(('{', '}'), writers, depth, out);
            }
            serde_json::Value::String(text) => self.string(text, out),
            serde_json::Value::Number(n) if n.is_f64() => out.push_str(&float(n.as_f64().unwrap_or(0.0))),
            other => out.push_str(&other.to_string()),
        }
    }

    fn list<W: FnOnce(&mut String)>(
        &self,
        (open, close): (char, char),
        items: impl Iterator<Item = W>,
        depth: usize,
        out: &mut String,
    ) {
        out.push(open);
        let mut empty = true;
        for write in items {
            if !empty {
                out.push_str(&self.item);
            }
            empty = false;
            self.new_line(depth + 1, out);
            write(out);
        }
        if !empty {
            self.new_line(depth, out);
        }
        out.push(close);
    }

    fn new_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        let quoted = serde_json::Value::from(text).to_string();
        for c in quoted.chars() {
            if self.ascii && !c.is_ascii() {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            } else {
                out.push(c);
            }
        }
    }
}

/// `repr` of a finite float: shortest digits, an exponent below 1e-4 and from 1e16 on.
fn float(value: f64) -> String {
    let shortest = format!("{value:e}");
    let (digits, exponent) = shortest.split_once('e').unwrap_or((&shortest, "0"));
    match exponent.parse::<i32>() {
        Ok(e) if !(-4..16).contains(&e) => format!("{digits}e{}{:02}", if e < 0 { '-' } else { '+' }, e.abs()),
        _ => format!("{value:?}"),
    }
}

/// `strftime` for the directives chat templates use, in UTC.
pub(super) fn strftime(seconds: i64, format: &str) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let weekday = DAYS[days.rem_euclid(7) as usize];
    let month_name = MONTHS[month as usize - 1];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&format!("{year:04}")),
            Some('y') => out.push_str(&format!("{:02}", year.rem_euclid(100))),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('j') => out.push_str(&format!("{:03}", days - day_number(year) + 1)),
            Some('H') => out.push_str(&format!("{:02}", second / 3600)),
            Some('I') => out.push_str(&format!("{:02}", (second / 3600 + 11) % 12 + 1)),
            Some('M') => out.push_str(&format!("{:02}", second / 60 % 60)),
            Some('S') => out.push_str(&format!("{:02}", second % 60)),
            Some('p') => out.push_str(if second < 43_200 { "AM" } else { "PM" }),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('%') => out.push('%'),
            other => {
                let message = format!("strftime_now does not know `%{}`", other.unwrap_or(' '));
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
    }
    Ok(out)
}

/// Year, month and day of a day number since 1970-01-01 in the proleptic Gregorian calendar (Hinnant's algorithm).
fn civil(days: i64) -> (i64, u32, u32) {
    let z = days.saturating_add(719_468);
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = (day_of_year - (153 * shifted + 2) / 5 + 1) as u32;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 } as u32;
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

/// Day number of the first of January of `year`, since 1970-01-01.
fn day_number(year: i64) -> i64 {
    let y = year - 1;
    y * 365 + y.div_euclid(4) - y.div_euclid(100) + y.div_euclid(400) - 719_162
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_round_trip() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(-1), (1969, 12, 31));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(day_number(1970), 0);
        assert_eq!(day_number(2000), 10_957);
        assert_eq!(strftime(951_782_399, "%a %H:%M:%S").unwrap(), "Mon 23:59:59");
    }
}

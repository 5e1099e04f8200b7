//! A reader of pickles that builds a tree of plain data and runs nothing: what a pickle calls (a class, a function) is kept as its name
//! with its arguments. The opcodes are those of protocols 2 to 4 that plain data needs (Python's `pickletools`); any other is refused.

use std::str;

/// A node of a [`Pickle`].
pub(super) type Index = usize;

#[derive(Debug)]
pub(super) enum Node {
    Int(i64),
    Text(String),
    /// What is told apart from other values but never used: `None`, booleans, floats and bytes.
    Opaque,
    /// Lists, tuples and sets.
    Items(Vec<Index>),
    Dict(Vec<(Index, Index)>),
    /// `module.name`
    Global(String),
    /// A call of `class`, and the state that was given to its result.
    Object {
        class: Index,
        args: Index,
        state: Option<Index>,
    },
}

pub(super) struct Pickle {
    nodes: Vec<Node>,
    root: Index,
}

impl Pickle {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        Machine { rest: bytes, nodes: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: Vec::new() }.run()
    }

    pub(super) fn root(&self) -> Index {
        self.root
    }

    pub(super) fn node(&self, index: Index) -> &Node {
        &self.nodes[index]
    }

    pub(super) fn text(&self, index: Index) -> Option<&str> {
        match self.node(index) {
            Node::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn size(&self, index: Index) -> Option<usize> {
        match self.node(index) {
            Node::Int(value) => usize::try_from(*value).ok(),
            _ => None,
        }
    }

    pub(super) fn items(&self, index: Index) -> Option<&[Index]> {
        match self.node(index) {
            Node::Items(items) => Some(items),
            _ => None,
        }
    }

    pub(super) fn dict(&self, index: Index) -> Option<&[(Index, Index)]> {
        match self.node(index) {
            Node::Dict(entries) => Some(entries),
            _ => None,
        }
    }

    pub(super) fn global(&self, index: Index) -> Option<&str> {
        match self.node(index) {
            Node::Global(name) => Some(name),
            _ => None,
        }
    }

    /// The arguments of an object whose class has this name.
    pub(super) fn args_of(&self, index: Index, name: &str) -> Option<&[Index]> {
        match *self.node(index) {
            Node::Object { class, args, .. } if self.global(class) == Some(name) => self.items(args),
            _ => None,
        }
    }

    /// The state of an object.
    pub(super) fn state(&self, index: Index) -> Option<Index> {
        match *self.node(index) {
            Node::Object { state, .. } => state,
            _ => None,
        }
    }

    /// An attribute of an object whose state is a dictionary.
    pub(super) fn attribute(&self, index: Index, name: &str) -> Option<Index> {
        let entries = self.dict(self.state(index)?)?;
        entries.iter().find(|(key, _)| self.text(*key) == Some(name)).map(|(_, value)| *value)
    }
}

struct Machine<'a> {
    rest: &'a [u8],
    nodes: Vec<Node>,
    stack: Vec<Index>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: Vec<Option<Index>>,
}

impl Machine<'_> {
    fn run(mut self) -> Result<Pickle, String> {
        loop {
            let opcode = self.byte()?;
            match opcode {
                0x80 => _ = self.byte()?,
                0x95 => _ = self.take(8)?,
                b'.' => {
                    let root = self.pop()?;
                    return Ok(Pickle { nodes: self.nodes, root });
                }
                b'(' => self.marks.push(self.stack.len()),
                b'0' => _ = self.pop()?,
                b'N' | 0x88 | 0x89 => self.push(Node::Opaque),
                b'K' => self.integer(1)?,
                b'M' => self.integer(2)?,
                b'J' => {
                    let value = i32::from_le_bytes(self.array()?);
                    self.push(Node::Int(value.into()));
                }
                0x8a => {
                    let bytes = self.byte()?;
                    self.long(bytes.into())?;
                }
                b'G' => {
                    self.take(8)?;
                    self.push(Node::Opaque);
                }
                0x8c => self.string(1)?,
                b'X' => self.string(4)?,
                0x8d => self.string(8)?,
                b'C' => self.skip_bytes(1)?,
                b'B' => self.skip_bytes(4)?,
                0x8e => self.skip_bytes(8)?,
                b'}' => self.push(Node::Dict(Vec::new())),
                b']' | b')' | 0x8f => self.push(Node::Items(Vec::new())),
                0x85..=0x87 => {
                    let items = self.pop_many(usize::from(opcode) - 0x84)?;
                    self.push(Node::Items(items));
                }
                b't' | b'l' | 0x91 => {
                    let items = self.pop_to_mark()?;
                    self.push(Node::Items(items));
                }
                b'a' => {
                    let item = self.pop()?;
                    self.extend_items(vec![item])?;
                }
                b'e' | 0x90 => {
                    let items = self.pop_to_mark()?;
                    self.extend_items(items)?;
                }
                b's' => {
                    let entry = self.pop_many(2)?;
                    self.extend_dict(&entry)?;
                }
                b'u' => {
                    let entries = self.pop_to_mark()?;
                    self.extend_dict(&entries)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.push(Node::Global(format!("{module}.{name}")));
                }
                0x93 => {
                    let (name, module) = (self.pop_text()?, self.pop_text()?);
                    self.push(Node::Global(format!("{module}.{name}")));
                }
                // REDUCE calls, NEWOBJ makes an instance: here both only say what would have been called.
                b'R' | 0x81 => {
                    let (args, class) = (self.pop()?, self.pop()?);
                    self.push(Node::Object { class, args, state: None });
                }
                b'b' => {
                    let state = self.pop()?;
                    let object = *self.stack.last().ok_or_else(underflow)?;
                    match &mut self.nodes[object] {
                        Node::Object { state: slot, .. } => *slot = Some(state),
                        _ => return Err("it gives a state to what is no object".to_owned()),
                    }
                }
                0x94 => self.memoize(self.memo.len())?,
                b'q' => {
                    let slot = self.byte()?;
                    self.memoize(slot.into())?;
                }
                b'r' => {
                    let slot = u32::from_le_bytes(self.array()?);
                    self.memoize(slot as usize)?;
                }
                b'h' => {
                    let slot = self.byte()?;
                    self.recall(slot.into())?;
                }
                b'j' => {
                    let slot = u32::from_le_bytes(self.array()?);
                    self.recall(slot as usize)?;
                }
                other => return Err(format!("its pickle has opcode {other:#04x}, which plain data does not need")),
            }
        }
    }

    fn take(&mut self, len: usize) -> Result<&[u8], String> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or("its pickle is cut")?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.array::<1>()?[0])
    }

    /// A length of `bytes` bytes.
    fn length(&mut self, bytes: usize) -> Result<usize, String> {
        let mut all = [0; 8];
        all[..bytes].copy_from_slice(self.take(bytes)?);
        usize::try_from(u64::from_le_bytes(all)).map_err(|_| "its pickle is cut".to_owned())
    }

    fn integer(&mut self, bytes: usize) -> Result<(), String> {
        let value = self.length(bytes)?;
        self.push(Node::Int(value as i64));
        Ok(())
    }

    /// A signed integer of `bytes` bytes.
    fn long(&mut self, bytes: usize) -> Result<(), String> {
        let digits = self.take(bytes)?;
        if bytes > 8 {
            return Err("its pickle has an integer of more than 64 bits".to_owned());
        }
        let fill = if digits.last().is_some_and(|last| last & 0x80 != 0) { 0xff } else { 0 };
        let mut all = [fill; 8];
        all[..bytes].copy_from_slice(digits);
        self.push(Node::Int(i64::from_le_bytes(all)));
        Ok(())
    }

    fn string(&mut self, length_bytes: usize) -> Result<(), String> {
        let len = self.length(length_bytes)?;
        let text = str::from_utf8(self.take(len)?).map_err(|_| "its pickle has a text that is not UTF-8")?.to_owned();
        self.push(Node::Text(text));
        Ok(())
    }

    fn skip_bytes(&mut self, length_bytes: usize) -> Result<(), String> {
        let len = self.length(length_bytes)?;
        self.take(len)?;
        self.push(Node::Opaque);
        Ok(())
    }

    fn line(&mut self) -> Result<String, String> {
        let end = self.rest.iter().position(|byte| *byte == b'\n').ok_or("its pickle is cut")?;
        let line = String::from_utf8_lossy(self.take(end)?).into_owned();
        self.take(1)?;
        Ok(line)
    }

    fn push(&mut self, node: Node) {
        self.stack.push(self.nodes.len());
        self.nodes.push(node);
    }

    fn pop(&mut self) -> Result<Index, String> {
        // What lies below a mark is not there until the mark is gone.
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err(underflow());
        }
        self.stack.pop().ok_or_else(underflow)
    }

    fn pop_many(&mut self, count: usize) -> Result<Vec<Index>, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len().checked_sub(count) {
            Some(start) if start >= floor => Ok(self.stack.split_off(start)),
            _ => Err(underflow()),
        }
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Index>, String> {
        let mark = self.marks.pop().ok_or_else(underflow)?;
        Ok(self.stack.split_off(mark))
    }

    fn pop_text(&mut self) -> Result<String, String> {
        let index = self.pop()?;
        match &self.nodes[index] {
            Node::Text(text) => Ok(text.clone()),
            _ => Err("its pickle names a class by what is no text".to_owned()),
        }
    }

    fn extend_items(&mut self, items: Vec<Index>) -> Result<(), String> {
        let list = *self.stack.last().ok_or_else(underflow)?;
        match &mut self.nodes[list] {
            Node::Items(all) => all.extend(items),
            _ => return Err("its pickle adds items to what is no list".to_owned()),
        }
        Ok(())
    }

    fn extend_dict(&mut self, entries: &[Index]) -> Result<(), String> {
        let dict = *self.stack.last().ok_or_else(underflow)?;
        let pairs = entries.chunks_exact(2).map(|pair| (pair[0], pair[1]));
        match &mut self.nodes[dict] {
            Node::Dict(all) => all.extend(pairs),
            _ => return Err("its pickle adds keys to what is no dictionary".to_owned()),
        }
        Ok(())
    }

    fn memoize(&mut self, slot: usize) -> Result<(), String> {
        let top = *self.stack.last().ok_or_else(underflow)?;
        // A slot of the memo is written once, in order, by every writer; anything else could claim any amount of memory.
        if slot > self.memo.len() {
            return Err("its pickle skips places of its memo".to_owned());
        }
        if slot == self.memo.len() {
            self.memo.push(None);
        }
        self.memo[slot] = Some(top);
        Ok(())
    }

    fn recall(&mut self, slot: usize) -> Result<(), String> {
        let index = self.memo.get(slot).copied().flatten().ok_or("its pickle recalls what it has not stored")?;
        self.stack.push(index);
        Ok(())
    }
}

fn underflow() -> String {
    "its pickle takes more than it has".to_owned()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn plain_data_is_read_and_calls_are_only_noted() {
        // pickle.dumps({"a": [1, -2, 300, True, None], "b": os.system, ...}, 4) in opcodes.
        let bytes = b"\x80\x04}\x94(\x8c\x01a\x94](K\x01J\xfe\xff\xff\xffM\x2c\x01\x88Ne\x8c\x01b\x8c\x02os\x8c\x06system\x93\x8c\x04exit\x85Ru.";
        let pickle = Pickle::parse(bytes).unwrap();
        let [(a, list), (b, call)] = pickle.dict(pickle.root()).unwrap() else { panic!("two keys") };
        assert_eq!((pickle.text(*a), pickle.text(*b)), (Some("a"), Some("b")));
        let list = pickle.items(*list).unwrap();
        assert!(matches!(pickle.node(list[1]), Node::Int(-2)));
        assert_eq!((pickle.size(list[0]), pickle.size(list[1]), pickle.size(list[2])), (Some(1), None, Some(300)));
        assert!(matches!(pickle.node(list[3]), Node::Opaque) && list.len() == 5);
        let args = pickle.args_of(*call, "os.system").unwrap();
        assert_eq!(pickle.text(args[0]), Some("exit"));
    }

    #[test]
    fn what_is_no_plain_data_is_refused() {
        let error = |bytes: &[u8]| Pickle::parse(bytes).err().unwrap();
        assert_eq!(error(b""), "its pickle is cut");
        assert_eq!(error(b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff"), "its pickle is cut");
        assert_eq!(error(b"."), "its pickle takes more than it has");
        assert_eq!(error(b"K\x01(\x85."), "its pickle takes more than it has");
        assert_eq!(error(b"K\x01Nb."), "it gives a state to what is no object");
        assert_eq!(error(b"Nr\xff\xff\xff\xff."), "its pickle skips places of its memo");
        assert_eq!(error(b"h\x00."), "its pickle recalls what it has not stored");
        assert_eq!(error(b"NQ."), "its pickle has opcode 0x51, which plain data does not need");
        assert_eq!(error(b"Na."), "its pickle takes more than it has");
    }
}
